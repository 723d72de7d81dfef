"""``gradsigns import-2021``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsigns_lightning.cli.runner import Outcome
from gradsigns_lightning.cli.tables import check_json_path, print_rows, verification_rows, write_json
from gradsigns_lightning.data.decoding import read_folder
from gradsigns_lightning.models.release_2021 import load_2021
from gradsigns_lightning.runs.build import to_plain
from gradsigns_lightning.verification import verify, verify_api


def run(config: Any) -> Outcome:
    """Read the authors' key from their model's weights and through its probabilities, and report both.

    Returns:
        The outcome for a sweep's table.

    Raises:
        ValueError: the release or the images cannot be read.
    """
    settings = to_plain(config)
    check_json_path(settings["json"])
    key, model = load_2021(settings["folder"], mean_image=_mean_image(settings["mean_image"]))
    images = read_folder(settings["images"], key.input_shape)
    white_box = verify(model, key, images, alpha=settings["alpha"])

    @torch.inference_mode()
    def predict(probes: Tensor) -> Tensor:
        probabilities: Tensor = model(probes).softmax(1)
        return probabilities

    black_box = verify_api(predict, key, images, alpha=settings["alpha"], **settings["api"])
    found = {
        "from the weights": verification_rows(white_box),
        "from the probabilities alone": verification_rows(black_box),
    }
    for title, rows in found.items():
        print_rows(rows, title=title)
    if settings["json"]:
        write_json(settings["json"], {"white_box": white_box.to_dict(), "black_box": black_box.to_dict()})
    return Outcome(cell={title: rows["verdict"] for title, rows in found.items()})


def _mean_image(path: str | None) -> Tensor | None:
    if path is None:
        return None
    try:
        # Memory-mapped: a header that claims more than the file holds is noticed before any allocation.
        array = np.load(Path(path).expanduser(), allow_pickle=False, mmap_mode="r")
        return torch.from_numpy(np.array(array, dtype=np.float32))
    except Exception as error:  # numpy evaluates the header, whose errors have no other base class
        raise ValueError(f"`mean_image` must name a .npy file of numbers, got {str(path)!r}.") from error
