"""The model in dispute: a checkpoint, an ONNX file or an endpoint; and the images to read it with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradsigns_lightning.cli.build import build, to_plain
from gradsigns_lightning.cli.checkpoint import description_of, load_classifier, read_checkpoint
from gradsigns_lightning.cli.images import read_folder
from gradsigns_lightning.cli.keys import check_key_fits
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.extraction import VerificationResult, verify, verify_api
from gradsigns_lightning.extraction.asking import Oracle
from gradsigns_lightning.extraction.oracles import HttpOracle, OnnxOracle, normalised

_KINDS = ("checkpoint", "onnx", "endpoint")


@dataclass(frozen=True)
class Suspect:
    """A model in dispute.

    Attributes:
        kind: ``"checkpoint"``, ``"onnx"`` or ``"endpoint"``.
        source: path or address.
        model: the classifier, or what answers for it.
        data_name: data group that a checkpoint was trained on, else None.
    """

    kind: str
    source: str
    model: nn.Module | Oracle
    data_name: str | None = None


def open_suspect(settings: dict[str, Any], key: WatermarkKey) -> Suspect:
    """Return the suspect that the command line names.

    Raises:
        ValueError: none or several are named, or it cannot be read or does not fit the key.
    """
    named = {kind: settings[kind] for kind in _KINDS if settings[kind] is not None}
    if len(named) != 1:
        raise ValueError(f"one of `checkpoint`, `onnx` and `endpoint` must be given, got {' and '.join(named) or 'none'}.")
    ((kind, source),) = named.items()
    if kind == "checkpoint":
        return open_checkpoint(source, key)
    if kind == "onnx":
        oracle: Oracle = OnnxOracle(source)
    else:
        http = settings["http"]
        oracle = HttpOracle(
            source, build(settings["protocol"]), headers=http["headers"], timeout=http["timeout"], retries=http["retries"]
        )
    return Suspect(kind, source, normalised(oracle, key) if settings["normalised"] else oracle)


def open_checkpoint(path: str, key: WatermarkKey) -> Suspect:
    """Return the classifier in a checkpoint of ``gradsigns train``.

    Raises:
        ValueError: it is something else, or its images are not the key's.
    """
    checkpoint = read_checkpoint(path)
    description = description_of(checkpoint, path)
    data = description["data"]
    check_key_fits(key, input_shape=data["input_shape"], input_mean=data["mean"], input_std=data["std"])
    return Suspect("checkpoint", path, load_classifier(checkpoint, description), data["name"])


def open_control(path: str, key: WatermarkKey) -> nn.Module | Oracle:
    """Return a control model: an ONNX file, or a checkpoint of ``gradsigns train``."""
    return OnnxOracle(path) if path.endswith(".onnx") else open_checkpoint(path, key).model


def read(suspect: Suspect, key: WatermarkKey, images: Tensor, settings: dict[str, Any]) -> VerificationResult:
    """Read a key from a checkpoint's weights, or through what answers for the model."""
    if isinstance(suspect.model, nn.Module):
        return verify(suspect.model, key, images, alpha=settings["alpha"])
    return verify_api(suspect.model, key, images, alpha=settings["alpha"], **settings["api"])


def suspect_images(settings: dict[str, Any], command: str, key: WatermarkKey, data_name: str | None) -> Tensor:
    """Return images of the key's target class: those of ``images=FOLDER``, else test images of ``data=...`` or of ``data_name``.

    Raises:
        ValueError: none of them is given, or the data cannot be read.
    """
    if settings["images"] is not None:
        return read_folder(settings["images"], key.input_shape)
    if settings["data"] is None and data_name is None:
        raise ValueError("`images` must name a folder with images of the key's target class, or `data` a data set.")
    data = settings["data"] or _compose_data(command, str(data_name))
    images: Tensor = build(data["module"]).raw_images("test", key.target_class)
    return images


def _compose_data(command: str, name: str) -> dict[str, Any]:
    """Compose the data group that the checkpoint names, beside what the command line says.

    Raises:
        ValueError: there is no such group or it needs more, for example a folder.
    """
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import MissingConfigException

    try:
        config = compose(command, overrides=[*HydraConfig.get().overrides.task, f"data={name}"])
        data: dict[str, Any] = to_plain(config.data)
    except MissingConfigException as error:
        raise ValueError(f"`data`: the checkpoint names data {name!r}, which is not shipped; give `images=FOLDER`.") from error
    return data
