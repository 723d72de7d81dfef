"""Canonical JSON: one text for one value, so that it can be hashed, signed and compared (docs/key-format.md)."""

from __future__ import annotations

import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Return ``value`` as one line of ASCII without spaces, members sorted by name."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
