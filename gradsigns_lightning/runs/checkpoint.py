"""The description in a checkpoint of ``gradsigns train``, from which ``gradsigns verify`` rebuilds the model.

A checkpoint may come from anyone, and nothing in it is run. Its tensors are read by
``torch.load(weights_only=True)``, its description is checked against the table of networks, and memory is
allocated for a network only if the file holds weights with its names and shapes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradsigns_lightning.core.torch_state.memory import saved_bytes
from gradsigns_lightning.core.utils.archive import check_archive
from gradsigns_lightning.models.catalogue import CLASSES, described_network, input_shape
from gradsigns_lightning.models.foreign import each, mapping, real, shown
from gradsigns_lightning.models.skeleton import skeleton
from gradsigns_lightning.runs.options import check_is_file

ENTRY = "gradsigns"
FORMAT = 1
_MOST_ACTIVATIONS = 2**30  # bytes for one image; a ViT-L with patches of 16 on 224 pixels keeps half of them
_LONGEST_NAME = 200  # characters of a data set's name
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def describe(model: dict[str, Any], data: dict[str, Any], commitment: str) -> dict[str, Any]:
    """Return the checkpoint's description of the model, as plain types.

    Args:
        model: resolved configuration of the network.
        data: resolved configuration of the data; its name and shapes are kept.
        commitment: the key's public commitment.
    """
    kept = {name: data[name] for name in ("name", "n_classes", "input_shape", "mean", "std")}
    return {ENTRY: {"format": FORMAT, "model": model, "data": kept, "commitment": commitment}}


def read_checkpoint(path: str, *, argument: str = "checkpoint") -> dict[str, Any]:
    """Read a checkpoint as plain data: nothing in it is run, and it takes no more memory than its size.

    Raises:
        ValueError: the file is missing, or is not a checkpoint with weights.
    """
    file = Path(path).expanduser()
    check_is_file(argument, str(path), "a checkpoint file")
    if file.suffix == ".safetensors":
        raise ValueError(
            f"`{argument}`: {str(path)!r} holds weights alone, so how to build its model is not known. Load "
            "it in Python and call gradsigns_lightning.verify(model, key, images)."
        )
    try:
        check_archive(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a forged pickle makes torch raise has no base class in common
        reason = f": {str(error)[:200]}" if type(error) is ValueError else ""
        raise ValueError(
            f"`{argument}`: {str(path)!r} is damaged, or not a checkpoint of weights and plain types{reason}."
        ) from error
    content = dict(dict.items(content)) if isinstance(content, dict) else {}
    if not isinstance(content.get("state_dict"), dict):
        raise ValueError(
            f"`{argument}`: {str(path)!r} has no `state_dict`; it is not a Lightning checkpoint."
        )
    content["state_dict"] = state = dict(dict.items(content["state_dict"]))
    # A view may repeat one stored number any number of times.
    if (
        sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))
        > file.stat().st_size
    ):
        raise ValueError(f"`{argument}`: {str(path)!r} describes larger tensors than it holds.")
    return content


def description_of(checkpoint: dict[str, Any], path: str) -> dict[str, Any]:
    """Return what :func:`describe` put into a checkpoint: ``model``, unchecked, and the checked ``data``.

    Raises:
        ValueError: the checkpoint was not written by ``gradsigns train``, or by a later release, or its data
            are not images.
    """
    parameters = checkpoint.get("hyper_parameters")
    description = mapping(parameters, "hyperparameters").get(ENTRY) if isinstance(parameters, dict) else None
    if not isinstance(description, dict):
        raise ValueError(
            f"`checkpoint`: {str(path)!r} was not written by `gradsigns train`, so how to build its model is "
            "not known. Load it in Python and call gradsigns_lightning.verify(model, key, images)."
        )
    stated = mapping(description, "description")
    if type(stated.get("format")) is not int or stated["format"] != FORMAT:
        raise ValueError(
            f"`checkpoint`: {str(path)!r} has format {shown(stated.get('format'))}, this release reads "
            f"{FORMAT}."
        )
    return {"model": stated.get("model"), "data": _data(stated.get("data"))}


def _data(stated: Any) -> dict[str, Any]:
    values = mapping(stated, "description of the data")
    name, shape = values.get("name"), input_shape("input_shape", values.get("input_shape"))
    if type(name) is not str or len(name) > _LONGEST_NAME:
        raise ValueError(f"`checkpoint`: its `name` of the data must be a short text, got {shown(name)}.")
    channels = {"shortest": shape[0], "longest": shape[0]}
    return {
        "name": name,
        "n_classes": CLASSES("n_classes", values.get("n_classes")),
        "input_shape": shape,
        "mean": each(real(-1e6, 1e6), **channels)("mean", values.get("mean")),
        "std": each(real(0, 1e6, above=True), **channels)("std", values.get("std")),
    }


class Network(nn.Module):
    """A network under the names that :class:`~gradsigns_lightning.models.Classifier` gives its weights.

    Reading needs no more of a classifier, and Lightning takes seconds to import.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(n, n_classes)`` of inputs ``(n, C, H, W)``."""
        logits: Tensor = self.net(x)
        return logits


def load_classifier(checkpoint: dict[str, Any], description: dict[str, Any]) -> Network:
    """Return the classifier that a checkpoint describes, with its weights.

    Args:
        checkpoint: of :func:`read_checkpoint`.
        description: of :func:`description_of`.

    Raises:
        ValueError: the description names something other than a network, or the weights do not fit it.
        ImportError: the network is torchvision's, which is not installed.
    """
    network = described_network(description["model"])

    def make() -> Network:
        return Network(network())

    outline = _skeleton(make)
    _fitting(checkpoint["state_dict"], outline.state_dict(), argument="checkpoint")
    _check_memory(outline, description["data"]["input_shape"])
    classifier = make()
    load_weights(classifier, checkpoint, argument="checkpoint")
    return classifier.eval()


def load_weights(classifier: nn.Module, checkpoint: dict[str, Any], *, argument: str) -> None:
    """Copy a checkpoint's weights into ``classifier``.

    Raises:
        ValueError: they do not fit.
    """
    own = classifier.state_dict()
    weights = _fitting(checkpoint["state_dict"], own, argument=argument)
    # The version of each module that wrote the weights decides how they are read: take this process's.
    weights._metadata = own._metadata  # type: ignore[attr-defined]
    classifier.load_state_dict(weights)


def _check_memory(outline: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuse a network that takes more memory for one image than any real one; the file states both sizes."""
    image = torch.empty(1, *shape, device="meta", requires_grad=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # as in reading; fused attention keeps less
            needed = saved_bytes(outline, lambda: outline.eval()(image))
    except RuntimeError as error:
        raise ValueError(
            f"`checkpoint` describes a network that does not take images of shape {shape}."
        ) from error
    if needed > _MOST_ACTIVATIONS:
        raise ValueError(
            f"`checkpoint` describes a network that keeps {needed} bytes for one image of shape {shape}; at "
            f"most {_MOST_ACTIVATIONS} are allowed. Load it in Python and call "
            "gradsigns_lightning.verify(model, key, images)."
        )


def _skeleton(make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return skeleton(make)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`checkpoint` describes a network that cannot be built: {str(error)[:300]}"
        ) from error


def _fitting(
    state: Mapping[Any, Any], expected: Mapping[str, Tensor], *, argument: str
) -> OrderedDict[str, Tensor]:
    """Return the weights of ``state``, which must have the names and shapes of ``expected``."""
    reason = None
    if state.keys() != expected.keys():
        missing = next((repr(name) for name in expected if name not in state), "none")
        unknown = next((shown(name) for name in state if name not in expected), "none")
        counts = f"there are {len(state)} instead of {len(expected)}"
        reason = f"{counts}; first that is missing: {missing}; first that is unknown: {unknown}"
    for name, wanted in expected.items() if reason is None else ():
        problem = _problem(state[name], wanted)
        if problem:
            reason = f"{name!r} must be a dense tensor {wanted.dtype} {tuple(wanted.shape)}, got {problem}"
            break
    if reason is not None:
        raise ValueError(f"`{argument}`: the weights do not fit the model: {reason}.")
    return OrderedDict((name, state[name]) for name in expected)


def _problem(value: Any, wanted: Tensor) -> str | None:
    """Return what ``value`` is if it is not a tensor that can be copied into ``wanted``, else None."""
    if not isinstance(value, Tensor):
        return shown(value)
    kinds = _FLOATS if wanted.is_floating_point() else _INTEGERS
    dense = (
        type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and value.device.type == "cpu"
    )
    if not dense or value.is_nested or value.dtype not in kinds:
        return f"{value.dtype} {value.layout} on {value.device}"
    if value.shape != wanted.shape:
        return f"shape {tuple(value.shape[:8])}"
    return None
