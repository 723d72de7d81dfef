"""``gradsigns verify``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradsigns_lightning.cli.build import build, to_plain
from gradsigns_lightning.cli.checkpoint import description_of, load_classifier, read_checkpoint
from gradsigns_lightning.cli.images import read_folder
from gradsigns_lightning.cli.keys import check_key_fits
from gradsigns_lightning.cli.report import check_json_path, print_rows, verification_rows, write_json
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.extraction import verify


def run(config: Any) -> float:
    """Read a key from a checkpoint and report; the verdict does not change the exit code.

    Returns:
        The bit error rate; NaN if no bit could be read.

    Raises:
        ValueError: checkpoint, key and images do not fit together.
    """
    settings = to_plain(config)
    check_json_path(settings["json"])
    key_file = settings["key"]["path"]
    key = WatermarkKey.load(key_file)
    checkpoint = read_checkpoint(settings["checkpoint"])
    description = description_of(checkpoint, settings["checkpoint"])
    classifier = load_classifier(checkpoint, description)
    data = description["data"]
    check_key_fits(key, input_shape=data["input_shape"], input_mean=data["mean"], input_std=data["std"])
    images = _images(settings, data["name"], key)
    result = verify(classifier, key, images, alpha=settings["alpha"])
    rows = {
        **verification_rows(result),
        "key file": key_file,
        "checkpoint": settings["checkpoint"],
        "commitment": result.commitment,
    }
    print_rows(rows, title="gradsigns verify")
    if settings["json"]:
        sources = {"checkpoint": settings["checkpoint"], "key": key_file, "images": settings["images"], "data": data["name"]}
        write_json(settings["json"], {**result.to_dict(), **sources})
    return result.bit_error_rate


def _images(settings: dict[str, Any], data_name: str, key: WatermarkKey) -> Tensor:
    if settings["images"] is not None:
        return read_folder(settings["images"], key.input_shape)
    data = settings["data"] or _compose_data(data_name)
    images: Tensor = build(data["module"]).raw_images("test", key.target_class)
    return images


def _compose_data(name: str) -> dict[str, Any]:
    """Compose the data group that the checkpoint names, beside what the command line says.

    Raises:
        ValueError: there is no such group or it needs more, for example a folder.
    """
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import MissingConfigException

    try:
        config = compose("verify", overrides=[*HydraConfig.get().overrides.task, f"data={name}"])
        data: dict[str, Any] = to_plain(config.data)
    except MissingConfigException as error:
        raise ValueError(f"`data`: the checkpoint names data {name!r}, which is not shipped; give `images=FOLDER`.") from error
    return data
