"""Image files to pixels; a file may come from anyone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradsigns_lightning.core.utils.optional import require

# By content, whatever a file's name says: Pillow would hand an EPS file to Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MAX_SIDE = 1 << 15  # a resize takes memory for each row and column, however thin the image


def decode(path: Path, mode: str, size: tuple[int, int]) -> Tensor:
    """Decode one image file.

    Args:
        path: the file; its content decides its format, one of :data:`FORMATS`.
        mode: Pillow's name of the channels, ``"L"``, ``"RGB"`` or ``"RGBA"``.
        size: ``(height, width)`` of the result; the resize is bilinear and ignores the aspect ratio.

    Returns:
        A uint8 tensor of shape ``(C, height, width)``.

    Raises:
        ValueError: the file is missing, damaged, of another format, has more pixels than Pillow deems safe, or a longer side than
            :data:`MAX_SIDE`.
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
        limits = f"Pillow's limit of {pillow.MAX_IMAGE_PIXELS}, before or while it is resized, or a side of more than {MAX_SIDE}"
        raise ValueError(f"{str(path)!r} has more pixels than {limits}.") from error
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files, SyntaxError among it
        raise ValueError(f"{str(path)!r} cannot be read as an image ({', '.join(FORMATS)}).") from error
    if image.size != (width, height):
        image = image.resize((width, height), pillow.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def check_inside(folder: Path, files: Sequence[Path], *, argument: str) -> None:
    """Refuse links out of a folder, which may have been received: a picture that lies elsewhere would be read, sent and enclosed.

    Args:
        folder: the folder, which may be a link itself.
        files: files below it.
        argument: what named the folder, for the error.

    Raises:
        ValueError: a file lies elsewhere.
    """
    root = folder.resolve()
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise ValueError(f"`{argument}`: {str(file)!r} is a link to a file outside the folder; put a copy in its place.")
