"""Decodes image files, which may come from anyone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradsigns_lightning.core.utils.files import error_about
from gradsigns_lightning.core.utils.optional import require

# By content, whatever a file's name says: Pillow would hand an EPS file to Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# By these, files are found.
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_SIDE = 1 << 15  # a resize takes memory for each row and column, however thin the image
MAX_VALUES = 1 << 29  # of all images: two gigabytes as float32
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def image_files(folder: Path, *, below: bool) -> list[Path]:
    """Return the image files in ``folder``, or at any depth ``below`` it, sorted by path."""
    paths = folder.rglob("*") if below else folder.iterdir()
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file())


def decode(path: Path, mode: str, size: tuple[int, int]) -> Tensor:
    """Decode one image file.

    Args:
        path: the file; its content decides its format, one of :data:`FORMATS`.
        mode: Pillow's name of the channels, ``"L"``, ``"RGB"`` or ``"RGBA"``.
        size: ``(height, width)`` of the result; the resize is bilinear and ignores the aspect ratio.

    Returns:
        A uint8 tensor of shape ``(C, height, width)``.

    Raises:
        ValueError: the file is missing, damaged, of another format, has more pixels than Pillow deems safe,
            or a longer side than :data:`MAX_SIDE`.
        ImportError: Pillow is not installed.
    """
    pillow = require("PIL.Image", extra="vision")
    height, width = size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(path, formats=FORMATS) as opened:
                # A resize goes through an image of the new width and the old height.
                if max(opened.size) > MAX_SIDE or opened.height * width > pillow.MAX_IMAGE_PIXELS:
                    raise pillow.DecompressionBombError
                image = opened.convert(mode)
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise ValueError(
            f"{str(path)!r} has more pixels than Pillow's limit of {pillow.MAX_IMAGE_PIXELS}, before or "
            f"while it is resized, or a side of more than {MAX_SIDE}."
        ) from error
    # Pillow's readers raise nearly anything on damaged files, SyntaxError among it
    except Exception as error:
        raise ValueError(f"{str(path)!r} cannot be read as an image ({', '.join(FORMATS)}).") from error
    if image.size != (width, height):
        image = image.resize((width, height), pillow.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def check_inside(folder: Path, files: Sequence[Path], *, argument: str) -> None:
    """Refuse links out of a folder, which may have been received.

    Otherwise an image elsewhere on the machine would be read, sent to a server and put into a bundle.

    Args:
        folder: the folder, which may be a link itself.
        files: files below it.
        argument: what named the folder, for the error.

    Raises:
        ValueError: a file is outside the folder.
    """
    root = folder.resolve()
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise ValueError(
                f"`{argument}`: {str(file)!r} is a link to a file outside the folder; put a copy in its "
                "place."
            )


def read_folder(folder: str, input_shape: tuple[int, ...]) -> Tensor:
    """Return all images in a folder, sorted by name, raw in [0, 1] and resized where needed.

    Folders below it are not searched.

    Args:
        folder: the folder, which errors call ``images`` as the command line does; its images should be of the
            key's target class.
        input_shape: ``(C, H, W)`` of the key.

    Raises:
        ValueError: there is no such folder, it has no images, an image cannot be read or is outside it, image
            files cannot have so many channels, or the images would be too large.
        ImportError: Pillow is not installed.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        found = "a file" if path.exists() else "not there"
        raise error_about(path)(f"`images` must name a folder, got {str(folder)!r}, which is {found}.")
    files = image_files(path, below=False)
    if not files:
        raise ValueError(
            f"`images` must name a folder with images ({', '.join(SUFFIXES)}), got {str(folder)!r} without "
            "any."
        )
    channels, height, width = input_shape
    if channels not in _MODES:
        raise ValueError(
            f"`images`: files hold {sorted(_MODES)} channels, but the key's `input_shape` has {channels}."
        )
    if max(height, width) > MAX_SIDE or len(files) * channels * height * width > MAX_VALUES:
        raise ValueError(
            f"`images`: all images together may have {MAX_VALUES} values and sides of {MAX_SIDE}, got "
            f"{len(files)} images of the key's `input_shape` {tuple(input_shape)}."
        )
    check_inside(path, files, argument="images")
    return torch.stack([_read(file, _MODES[channels], (height, width)) for file in files]).float().div_(255)


def _read(file: Path, mode: str, size: tuple[int, int]) -> Tensor:
    try:
        return decode(file, mode, size)
    except ValueError as error:
        raise ValueError(f"`images`: {error}") from error
