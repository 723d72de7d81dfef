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


def read_idx(path: Path, *, sides: tuple[int, ...], max_bytes: int) -> Tensor:
    """Read a plain or gzip-compressed IDX file of unsigned bytes.

    Args:
        path: the file, which is decompressed if its name ends in ``.gz``.
        sides: shape of one item: ``(28, 28)`` of an image, ``()`` of a label.
        max_bytes: the most bytes that the file may have, decompressed; no more are read.

    Returns:
        A uint8 tensor of shape ``(n, *sides)`` with n >= 1.

    Raises:
        ValueError: the file is not an IDX file of such items, its length does not fit its header, or it is
            too large.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"`path` must be an IDX file, got {path}, which is damaged: {str(error)[:200]}."
        ) from error
    if len(data) > max_bytes:
        raise ValueError(f"`path` must hold at most {max_bytes} bytes, unpacked, got more: {path}.")
    magic = bytes([0, 0, _UINT8, 1 + len(sides)])
    if data[:4] != magic:
        raise ValueError(
            f"`path` must be an IDX file of unsigned bytes with {magic[3]} axes (it starts with "
            f"{magic.hex(' ')}), got {path}: {data[:4].hex(' ')}."
        )
    start = 4 + 4 * magic[3]
    n, *found = (int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    if n < 1 or tuple(found) != sides or len(data) - start != n * math.prod(sides):
        raise ValueError(
            f"`path` must hold one or more items of shape {sides}, as many as it states, got shape "
            f"{(n, *found)} and {max(0, len(data) - start)} bytes: {path}."
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).view(n, *sides)


def find_idx(folders: Iterable[Path], stem: str) -> Path | None:
    """Return the first of ``stem`` and ``stem.gz`` that exists in one of ``folders``, or ``None``."""
    candidates = (folder / name for folder in folders for name in (stem, f"{stem}.gz"))
    return next((path for path in candidates if path.is_file()), None)
