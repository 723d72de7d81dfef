"""The networks that a checkpoint may describe, and the arguments that each of them takes.

A checkpoint may come from anyone. Its description names a network of this table and states sizes; it cannot
name anything else, and nothing of it is looked up, resolved or called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from gradsigns_lightning.models.foreign import Check, each, mapping, one_of, real, shown, whole
from gradsigns_lightning.models.from_torchvision import import_models, torchvision_model
from gradsigns_lightning.models.mlp import MLP
from gradsigns_lightning.models.resnet20 import ResNet20
from gradsigns_lightning.models.small_resnet import SmallResNet
from gradsigns_lightning.models.vit import ViT

# Beyond what any real image or classifier has, and small enough that no product of sizes overflows.
CLASSES = whole(2, 10**6)
CHANNELS = whole(1, 4096)
_SIDE = whole(1, 2**14)
_WIDTH = whole(1, 2**16)
_OURS, _TORCHVISION = "gradsigns_lightning.models", "torchvision.models"


@dataclass(frozen=True)
class _Network:
    make: Callable[..., nn.Module]
    required: Mapping[str, Check] = field(default_factory=dict)
    optional: Mapping[str, Check] = field(default_factory=dict)


def input_shape(name: str, value: Any) -> tuple[int, int, int]:
    """Check the shape ``(C, H, W)`` of one image; ``name`` names it in the error."""
    channels, height, width = each(whole(1, 2**14), shortest=3, longest=3)(name, value)
    return CHANNELS(name, channels), height, width


def _torchvision_names() -> list[str]:
    models = import_models()
    names: list[str] = models.list_models(module=models)
    return names


_NETWORKS = {
    f"{_OURS}.MLP": _Network(
        MLP,
        {"input_shape": input_shape, "n_classes": CLASSES},
        {"hidden": each(whole(1, 2**20), shortest=0, longest=256)},
    ),
    f"{_OURS}.ResNet20": _Network(
        ResNet20, {}, {"in_channels": CHANNELS, "n_classes": CLASSES, "bn_momentum": real(0, 1, above=True)}
    ),
    f"{_OURS}.SmallResNet": _Network(
        SmallResNet,
        {"in_channels": CHANNELS, "n_classes": CLASSES},
        {"width": _WIDTH, "stem_stride": whole(1, 4)},
    ),
    f"{_OURS}.ViT": _Network(
        ViT,
        {"input_shape": input_shape, "n_classes": CLASSES},
        {"patch_size": _SIDE, "dim": _WIDTH, "depth": whole(1, 256), "heads": _WIDTH},
    ),
    f"{_OURS}.torchvision_model": _Network(
        torchvision_model,
        {"name": one_of(_torchvision_names, "a classifier of torchvision"), "n_classes": CLASSES},
        {"in_channels": CHANNELS},
    ),
}


def described_network(description: Any) -> Callable[[], nn.Module]:
    """Return a function that makes the network that a checkpoint describes.

    Args:
        description: plain values, as ``gradsigns train`` writes them: ``_target_``, one of the networks that
            this package ships or a classifier of torchvision, and its arguments.

    Returns:
        A function without arguments; the network that it makes has random weights.

    Raises:
        ValueError: the description is anything else; the message names ``checkpoint``.
        ImportError: the network is torchvision's, which is not installed.
    """
    stated = mapping(description, "description of the network")
    target = stated.pop("_target_", None)
    network = _find(target)
    known = {**network.required, **network.optional}
    for name in stated:
        if name not in known:
            raise ValueError(
                f"`checkpoint` describes {target} with {shown(name)}; its arguments are {', '.join(known)}."
            )
    missing = [name for name in network.required if name not in stated]
    if missing:
        raise ValueError(f"`checkpoint` describes {target} without {', '.join(missing)}.")
    arguments = {name: known[name](name, value) for name, value in stated.items()}
    return partial(network.make, **arguments)


def _find(target: Any) -> _Network:
    if type(target) is str and target in _NETWORKS:
        return _NETWORKS[target]
    package, _, name = target.rpartition(".") if type(target) is str else ("", "", "")
    if package == _TORCHVISION and name in _torchvision_names():
        return _Network(
            partial(_from_torchvision, name),
            {},
            {"num_classes": CLASSES, "weights": one_of(lambda: [None], "None")},
        )
    raise ValueError(
        f"`checkpoint` describes a model {shown(target)}, which is not a network of this package or "
        "torchvision. Load it in Python and call gradsigns_lightning.verify(model, key, images)."
    )


def _from_torchvision(name: str, *, num_classes: int = 1000, weights: None = None) -> nn.Module:
    model: nn.Module = import_models().get_model(name, weights=weights, num_classes=num_classes)
    return model
