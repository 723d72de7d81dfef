"""The IDX file format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

_UINT8 = 0x08


def read_idx(path: Path, *, max_bytes: int) -> Tensor:
    """Read a plain or gzip-compressed IDX file of unsigned bytes.

    Args:
        path: the file; a name that ends in ``.gz`` is decompressed.
        max_bytes: what the file may have, decompressed; no more is read.

    Returns:
        A uint8 tensor with the shape that the header states.

    Raises:
        ValueError: the file is not an IDX file of unsigned bytes, its length does not fit its header, or it is too large.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"`path` must be an IDX file, got {path}, which is damaged: {str(error)[:200]}.") from error
    if len(data) > max_bytes:
        raise ValueError(f"`path` must hold at most {max_bytes} bytes, unpacked, got more: {path}.")
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
