"""The model in dispute: a checkpoint, an ONNX file or an endpoint; and the images to read it with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.key.signature_key import SignatureKey
from gradsigns_lightning.core.result import ReadingResult
from gradsigns_lightning.core.utils.files import error_like
from gradsigns_lightning.data.decoding import MAX_VALUES, read_folder
from gradsigns_lightning.lazy import in_pythons_folder
from gradsigns_lightning.oracles import OnnxOracle, normalized
from gradsigns_lightning.oracles.http import Endpoint, without_credentials
from gradsigns_lightning.runs.build import build
from gradsigns_lightning.runs.checkpoint import description_of, load_classifier, read_checkpoint
from gradsigns_lightning.runs.key import check_key_fits
from gradsigns_lightning.runs.options import api_names, check_is_file, options
from gradsigns_lightning.verification import suspects
from gradsigns_lightning.verification.api.queries import Oracle
from gradsigns_lightning.verification.images import RawInputs

_WHERE = (
    "Say where the test images are: paths.data=FOLDER, the variable GRADSIGNS_DATA, or images=FOLDER. A "
    "folder `data` that happens to be in the current one is not read for a verdict; if it is your own, from "
    "which you trained, add paths.data=data."
)
_KINDS = ("checkpoint", "onnx", "endpoint")


@dataclass(frozen=True)
class Suspect:
    """A model in dispute.

    Attributes:
        kind: ``"checkpoint"``, ``"onnx"`` or ``"endpoint"``.
        source: path, or address without credentials: reports show it.
        model: the classifier, or the oracle that answers for it.
        data_name: name of the data that a checkpoint was trained on, else None.
        input_mean: mean of the normalization that a checkpoint states, one number a channel, else None.
        input_std: standard deviation of that normalization, likewise.
    """

    kind: str
    source: str
    model: nn.Module | Oracle
    data_name: str | None = None
    input_mean: tuple[float, ...] | None = None
    input_std: tuple[float, ...] | None = None


def open_suspect(settings: dict[str, Any], key: SignatureKey) -> Suspect:
    """Return the suspect that the command line names.

    Args:
        settings: settings of the command line.
        key: the key that it will be read with; its normalization is applied if ``normalized`` is set.

    Raises:
        ValueError: none or several are named, or the suspect cannot be read or does not fit the key.
    """
    named = {kind: settings[kind] for kind in _KINDS if settings[kind] is not None}
    if len(named) != 1:
        raise ValueError(
            f"one of `checkpoint`, `onnx` and `endpoint` must be given, got {' and '.join(named) or 'none'}."
        )
    ((kind, source),) = named.items()
    if kind == "checkpoint":
        return open_checkpoint(source, key)
    if kind == "onnx":
        check_is_file("onnx", source, "an ONNX file")
    with options({"path": "onnx", "url": "endpoint", **{name: f"http.{name}" for name in settings["http"]}}):
        if kind == "onnx":
            oracle: Oracle = OnnxOracle(source)
        else:
            oracle = Endpoint(source, build(settings["protocol"], option="protocol"), **settings["http"])
            source = without_credentials(source)
    return Suspect(kind, source, normalized(oracle, key) if settings["normalized"] else oracle)


def open_checkpoint(path: str, key: SignatureKey) -> Suspect:
    """Return the classifier in a checkpoint of ``gradsigns train``.

    How its inputs are normalized may differ from the key; see :func:`check_normalization`.

    Raises:
        ValueError: it is not such a checkpoint, or its images have another shape than the key's.
    """
    checkpoint = read_checkpoint(path)
    description = description_of(checkpoint, path)
    data = description["data"]
    if data["input_shape"] != tuple(key.input_shape):
        raise ValueError(
            f"`key` does not fit the checkpoint {str(path)!r}: `input_shape` is {tuple(key.input_shape)} in "
            f"the key and {data['input_shape']} in the checkpoint."
        )
    model = load_classifier(checkpoint, description)
    _check_images(model, data)
    return Suspect("checkpoint", path, model, data["name"], input_mean=data["mean"], input_std=data["std"])


@torch.inference_mode()
def _check_images(model: nn.Module, data: dict[str, Any]) -> None:
    """Check that a network takes images of its data's shape; the file states the two separately."""
    shape, n_classes = data["input_shape"], data["n_classes"]
    try:
        found = tuple(model(torch.zeros(1, *shape)).shape)
    except RuntimeError as error:
        raise ValueError(
            f"`checkpoint` describes a network that does not take images of shape {shape}."
        ) from error
    if found != (1, n_classes):
        raise ValueError(
            f"`checkpoint` describes a network that returns {found} for an image, not {n_classes} logits."
        )


def check_normalization(suspect: Suspect, key: WatermarkKey) -> None:
    """Raise a ``ValueError`` if a checkpoint states another normalization than ``key``; others state none."""
    if suspect.input_mean is not None and suspect.input_std is not None:
        check_key_fits(
            key, input_shape=key.input_shape, input_mean=suspect.input_mean, input_std=suspect.input_std
        )


def open_control(path: str, key: WatermarkKey) -> nn.Module | Oracle:
    """Return a control model that takes raw images: an ONNX file, or a checkpoint of ``gradsigns train``."""
    if path.endswith(".onnx"):
        check_is_file("controls", path, "ONNX files or checkpoints")
        with options({"path": "controls"}):
            return OnnxOracle(path)
    with options({"checkpoint": "controls"}):
        control = open_checkpoint(path, key)
    assert isinstance(control.model, nn.Module)
    assert control.input_mean is not None
    assert control.input_std is not None
    return RawInputs(control.model, input_mean=control.input_mean, input_std=control.input_std)


def read(suspect: Suspect, key: WatermarkKey, images: Tensor, settings: dict[str, Any]) -> ReadingResult:
    """Read a key from a checkpoint's weights, or through an oracle."""
    with options(api_names(settings)):
        return suspects.read(suspect.model, key, images, alpha=settings["alpha"], **settings["api"])


@dataclass(frozen=True)
class Images:
    """Images of the key's target class.

    Attributes:
        pixels: raw in [0, 1], shape ``(n, C, H, W)``.
        origin: the file, folder or package that they are from.
    """

    pixels: Tensor
    origin: str

    def row(self) -> dict[str, str]:
        """Return the line of a report that says which images were read."""
        return {"images": f"{len(self.pixels)}, from {self.origin}"}

    def to_dict(self) -> dict[str, Any]:
        """Return the same for JSON."""
        return {"images_from": self.origin, "n_images_given": len(self.pixels)}


def suspect_images(settings: dict[str, Any], key: WatermarkKey, data_name: str | None) -> Images:
    """Return images of the key's target class.

    They are those of ``images=FOLDER``, else test images of ``data=...``, else of the data set ``data_name``.

    The current folder may be a received one, and whoever chooses the images chooses the reading: a data set
    is read from where the user says or the system has it, never from a folder that happens to be there.

    Args:
        settings: settings of the command line; nothing else says where data are.
        key: the key, for its target class.
        data_name: name of the suspect's data, according to the suspect.

    Raises:
        ValueError: none of the three is given, or the data cannot be read.
    """
    if settings["paths"]["data"] == "":
        raise ValueError(
            "`paths.data` (or the variable GRADSIGNS_DATA) must name a folder, got '', which would be this "
            "one."
        )
    if settings["images"] is not None:
        origin = str(Path(settings["images"]).expanduser().resolve())
        return Images(read_folder(settings["images"], key.input_shape), origin)
    return _test_images(suspect_data(settings, data_name), key, settings)


def suspect_data(settings: dict[str, Any], data_name: str | None) -> Any:
    """Return the data module of ``data=...``, else the one that the suspect names.

    Args:
        settings: of the command line, which alone says where data lie.
        data_name: what the suspect says of itself.

    Raises:
        ValueError: none is given, or it cannot be made.
    """
    if settings["data"] is not None:
        module = settings["data"]["module"]
        with options({name: f"data.module.{name}" for name in module}):
            return build(module, option="data.module")
    if data_name is None:
        raise ValueError(
            "`images` must name a folder with images of the key's target class, or `data` a data set."
        )
    with in_pythons_folder():
        from gradsigns_lightning.data.catalogue import shipped_data  # data modules are Lightning's

    return shipped_data(data_name, settings["paths"]["data"])


def _test_images(data: Any, key: WatermarkKey, settings: dict[str, Any]) -> Images:
    most = max(1, MAX_VALUES // math.prod(data.input_shape))  # small files may be resized to large images
    try:
        pixels: Tensor = data.raw_images("test", key.target_class, limit=most)
    except ValueError as error:
        if data.root is not None or settings["paths"]["data"] is not None:
            raise
        raise error_like(error)(f"{error} {_WHERE}") from error
    return Images(pixels, data.origin(train=False))
