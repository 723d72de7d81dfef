"""The IDX file format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

_UINT8 = 0x08


def read_idx(path: Path) -> Tensor:
    """Read a plain or gzip-compressed IDX file of unsigned bytes.

    Args:
        path: the file; a name that ends in ``.gz`` is decompressed.

    Returns:
        A uint8 tensor with the shape that the header states.

    Raises:
        ValueError: the file is not an IDX file of unsigned bytes, or its length does not fit its header.
    """
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UINT8:
        raise ValueError(f"`path` must be an IDX file of unsigned bytes (it starts with 00 00 08), got {path}: {data[:4]!r}.")
    start = 4 + 4 * data[3]
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if len(data) - start != math.prod(shape):
        raise ValueError(f"`path` must hold the {math.prod(shape)} bytes of shape {shape}, got {len(data) - start}: {path}.")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).view(shape)


def find_idx(folders: Iterable[Path], stem: str) -> Path | None:
    """Return the first of ``stem`` and ``stem.gz`` which exists in one of ``folders``, or ``None``."""
    candidates = (folder / name for folder in folders for name in (stem, f"{stem}.gz"))
    return next((path for path in candidates if path.is_file()), None)
