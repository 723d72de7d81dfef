"""Images of a folder as the verification takes them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gradsigns_lightning.data.decoding import MAX_SIDE, check_inside, decode

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MAX_VALUES = 1 << 29  # of all images: two gigabytes as float32


def read_folder(folder: str, input_shape: tuple[int, ...]) -> Tensor:
    """Return all image files in ``folder`` (not in folders below it), sorted by name, raw in [0, 1], resized where needed.

    Args:
        folder: the folder; its images should be of the key's target class.
        input_shape: ``(C, H, W)`` of the key.

    Raises:
        ValueError: there is no such folder, no image in it, one that cannot be read or lies elsewhere, no image has so many
            channels, or the images would be too large.
        ImportError: Pillow is not installed.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        found = "a file" if path.exists() else "not there"
        raise ValueError(f"`images` must name a folder, got {str(folder)!r}, which is {found}.")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"`images` must name a folder with images ({', '.join(SUFFIXES)}), got {str(folder)!r} without any.")
    channels, height, width = input_shape
    if channels not in _MODES:
        raise ValueError(f"`images`: files hold {sorted(_MODES)} channels, but the key's `input_shape` has {channels}.")
    if max(height, width) > MAX_SIDE or len(files) * channels * height * width > MAX_VALUES:
        raise ValueError(
            f"`images`: all images together may have {MAX_VALUES} values and sides of {MAX_SIDE}, got {len(files)} images "
            f"of the key's `input_shape` {tuple(input_shape)}."
        )
    check_inside(path, files, argument="images")
    return torch.stack([_read(file, _MODES[channels], (height, width)) for file in files]).float().div_(255)


def _read(file: Path, mode: str, size: tuple[int, int]) -> Tensor:
    try:
        return decode(file, mode, size)
    except ValueError as error:
        raise ValueError(f"`images`: {error}") from error
