"""Reads arrays of numbers from MATLAB files of version 5, the format of SVHN.

SciPy's reader does not fit received files: it allocates memory for any length that a file states before it
looks for the content, and cells that are nested deeply enough end the process.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_HEADER, _PIECE = 128, 2**16
_ORDERS = {b"\0\1IM": "<", b"\1\0MI": ">"}
_INT32, _UINT32, _MATRIX, _COMPRESSED = 5, 6, 14, 15
_STORED = {2: "u1", 9: "f8"}
_CLASSES = (6, 9)  # double, whose numbers are stored as bytes where they fit, and uint8
_COMPLEX_OR_LOGICAL = 0x0A00
_MOST_AXES, _MOST_ARRAYS = 32, 64


def read_arrays(path: Path, names: Sequence[str], *, max_bytes: int) -> dict[str, npt.NDArray[Any]]:
    """Read arrays of bytes or doubles.

    Args:
        path: the file.
        names: the arrays that are wanted; others are skipped.
        max_bytes: the most bytes that the file may have, packed and unpacked.

    Returns:
        Those of the arrays that the file has.

    Raises:
        ValueError: it is not such a file, or too large; the message is only the reason.
    """
    if path.stat().st_size > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    data = np.fromfile(path, np.uint8).data
    order = _ORDERS.get(bytes(data[_HEADER - 4 : _HEADER]), "")
    if not order:
        raise ValueError("it is not a MATLAB file of version 5")
    elements = list(islice(_elements(data[_HEADER:], order, padding=1), _MOST_ARRAYS + 1))
    if len(elements) > _MOST_ARRAYS:
        raise ValueError(f"it has more than {_MOST_ARRAYS} arrays")
    if sum(_unpacked_size(kind, content, order) for kind, content in elements) > max_bytes:
        raise ValueError(f"it unpacks to more than {max_bytes} bytes")
    found: dict[str, npt.NDArray[Any]] = {}
    for kind, content in elements:
        parts = list(
            islice(
                _elements(_unpacked(content, order) if kind == _COMPRESSED else content, order, padding=8), 4
            )
        )
        name = bytes(parts[2][1]).decode("latin-1") if len(parts) == 4 else ""
        if name in found:
            raise ValueError(f"it has two arrays {name}")
        if name in names:
            found[name] = _numbers(parts, order)
    return found


def _elements(data: memoryview, order: str, *, padding: int) -> Iterator[tuple[int, memoryview]]:
    """Yield the kind and the content of each element of ``data``."""
    at = 0
    while at < len(data):
        kind, size = _tag(data[at : at + 8], order)
        start, end = at + 8, at + 8 + size
        if kind >> 16:  # a small element: up to four bytes, stored in place of their number
            kind, start, end = kind & 0xFFFF, at + 4, at + 4 + min(kind >> 16, 4)
        if end > len(data):
            raise ValueError("a part of it is cut off")
        yield kind, data[start:end]
        at = max(end, at + 8)
        at += -at % padding


def _tag(data: bytes | memoryview, order: str) -> tuple[int, int]:
    if len(data) < 8:
        raise ValueError("a part of it is cut off")
    kind, size = struct.unpack(f"{order}II", data)
    return kind, size


def _unpacked_size(kind: int, content: memoryview, order: str) -> int:
    if kind == _COMPRESSED:
        kind, size = _tag(_inflate(content[:_PIECE], zlib.decompressobj(), 8), order)
    else:
        size = len(content)
    if kind != _MATRIX:
        raise ValueError("it holds something other than arrays")
    return size


def _unpacked(content: memoryview, order: str) -> memoryview:
    """Return the elements of a compressed array, whose length must be the one that it states."""
    size = 8 + _unpacked_size(_COMPRESSED, content, order)
    stream, data = zlib.decompressobj(), bytearray()
    for start in range(0, len(content), _PIECE):
        data += _inflate(content[start : start + _PIECE], stream, size + 1 - len(data))
        if len(data) > size or stream.eof:
            break
    if len(data) != size or not stream.eof:
        raise ValueError("an array unpacks to another length than it states")
    return memoryview(data)[8:]


def _inflate(content: memoryview, stream: Any, most: int) -> bytes:
    try:
        data: bytes = stream.decompress(content, most)
    except zlib.error as error:
        raise ValueError(f"an array cannot be unpacked: {error}") from error
    return data


def _numbers(parts: Sequence[tuple[int, memoryview]], order: str) -> npt.NDArray[Any]:
    (flags_kind, flags), (shape_kind, sides), _, (kind, content) = parts
    if (flags_kind, len(flags), shape_kind) != (_UINT32, 8, _INT32) or not 4 <= len(sides) <= 4 * _MOST_AXES:
        raise ValueError("an array has no shape")
    (word,) = struct.unpack(f"{order}I", flags[:4])
    if word & 0xFF not in _CLASSES or word & _COMPLEX_OR_LOGICAL or kind not in _STORED:
        raise ValueError("an array is neither of bytes nor of doubles")
    shape = struct.unpack(f"{order}{len(sides) // 4}i", sides[: len(sides) // 4 * 4])
    dtype = np.dtype(order + _STORED[kind])
    if min(shape) < 1 or math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"an array of shape {shape} has {len(content)} bytes")
    return np.frombuffer(content, dtype).reshape(shape, order="F")
