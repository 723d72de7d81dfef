"""The classifiers of torchvision, untrained."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from gradsigns_lightning.core.checks import check_int
from gradsigns_lightning.data.optional import import_torchvision

# In training mode these two return auxiliary logits too, unless told otherwise.
_PLAIN = {"aux_logits": False, "init_weights": True}
_EXTRA: dict[str, dict[str, Any]] = {"googlenet": _PLAIN, "inception_v3": _PLAIN}


def torchvision_model(name: str, n_classes: int, in_channels: int = 3) -> nn.Module:
    """Return an untrained classifier of torchvision.

    Args:
        name: a name that ``torchvision.models.list_models(module=torchvision.models)`` lists, such as ``"resnet18"``.
        n_classes: number of classes, >= 2.
        in_channels: channels of the images; other than 3 replaces the first convolution.

    Returns:
        A module that maps float images ``(n, in_channels, H, W)`` to logits ``(n, n_classes)``.

    Raises:
        ImportError: torchvision is not installed.
        TypeError: an argument has the wrong type.
        ValueError: there is no such model, or an argument is out of its range.
    """
    check_int("n_classes", n_classes, minimum=2)
    check_int("in_channels", in_channels, minimum=1)
    models = import_torchvision("models")
    names = models.list_models(module=models)
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=4) or sorted(names)[:4]
        raise ValueError(f"`name` must be a classifier of torchvision, for example {', '.join(close)}, got {name!r}.")
    model: nn.Module = models.get_model(name, weights=None, num_classes=n_classes, **_EXTRA.get(name, {}))
    if in_channels != 3:
        _replace_first_convolution(model, in_channels)
    return model


def _replace_first_convolution(model: nn.Module, in_channels: int) -> None:
    path, old = next((path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    parent, _, attribute = path.rpartition(".")
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        (old.kernel_size[0], old.kernel_size[1]),
        stride=(old.stride[0], old.stride[1]),
        padding=old.padding if isinstance(old.padding, str) else (old.padding[0], old.padding[1]),
        bias=old.bias is not None,
    )
    setattr(model.get_submodule(parent), attribute, new)
