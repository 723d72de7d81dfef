"""The classifiers of torchvision, untrained."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.core.utils.checks import check_int
from gradsigns_lightning.core.utils.optional import require

# By default, these two return auxiliary logits too in training mode.
_PLAIN = {"aux_logits": False, "init_weights": True}
_EXTRA: dict[str, dict[str, Any]] = {"googlenet": _PLAIN, "inception_v3": _PLAIN}


def torchvision_model(name: str, n_classes: int, in_channels: int = 3) -> nn.Module:
    """Return an untrained classifier of torchvision.

    Hard sigmoids (MobileNetV3 has some) are replaced by the same function written as ``relu6(x + 3) / 6``:
    torch cannot differentiate the original twice, and a signature in the input gradient needs that.

    Args:
        name: a name that ``torchvision.models.list_models(module=torchvision.models)`` lists, such as
            ``"resnet18"``.
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
    models = import_models()
    names = models.list_models(module=models)
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=4) or sorted(names)[:4]
        raise ValueError(
            f"`name` must be a classifier of torchvision, for example {', '.join(close)}, got {name!r}."
        )
    model: nn.Module = models.get_model(name, weights=None, num_classes=n_classes, **_EXTRA.get(name, {}))
    _replace_hard_sigmoids(model)
    if in_channels != 3:
        _replace_first_convolution(model, in_channels)
    return model


def import_models() -> Any:
    """Return ``torchvision.models``.

    Raises:
        ImportError: torchvision is not installed.
    """
    return require("torchvision.models", extra="vision")


class _Hardsigmoid(nn.Module):
    """``nn.Hardsigmoid`` made of operations that have a second derivative in torch."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3.0) / 6.0


def _replace_hard_sigmoids(model: nn.Module) -> None:
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Hardsigmoid):
            _set_submodule(model, path, _Hardsigmoid())


def _replace_first_convolution(model: nn.Module, in_channels: int) -> None:
    path, old = next(
        (path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d)
    )
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        (old.kernel_size[0], old.kernel_size[1]),
        stride=(old.stride[0], old.stride[1]),
        padding=old.padding if isinstance(old.padding, str) else (old.padding[0], old.padding[1]),
        bias=old.bias is not None,
    )
    _set_submodule(model, path, new)


def _set_submodule(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)
