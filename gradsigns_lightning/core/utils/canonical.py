"""Canonical JSON, one text per value for hashes and signatures (docs/key-format.md), and untrusted JSON."""

from __future__ import annotations

import codecs
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Return ``value`` as one line of ASCII without spaces, members sorted by name."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def json_of(data: bytes) -> Any:
    """Read JSON in UTF-8.

    ``json.loads`` would guess other encodings from the bytes, and import their codecs.

    Raises:
        ValueError: the data is not JSON, or in another encoding.
    """
    return json.loads(data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogatepass"))


def parse_json(data: bytes, *, max_bytes: int, max_values: int) -> Any:
    """Read JSON that may come from a stranger, within bounds that are checked before it is parsed.

    Empty containers take tens of times their size in memory, so values count as well as bytes.

    Args:
        data: the text.
        max_bytes: largest size.
        max_values: largest number of values, counted by the characters that begin or separate them.

    Raises:
        ValueError: the data is larger, or not JSON.
    """
    if len(data) > max_bytes:
        raise ValueError(f"must have at most {max_bytes} bytes, got {len(data)}")
    n_values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if n_values > max_values:
        raise ValueError(f"must have at most {max_values} values, got {n_values}")
    try:
        return json_of(data)
    except RecursionError as error:
        raise ValueError("must not be nested so deeply") from error
