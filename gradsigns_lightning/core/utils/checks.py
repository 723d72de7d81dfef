"""Argument checks, so that all such errors of the package read alike."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from reprlib import repr as short
from typing import Any


def check_number(name: str, value: Any, *, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    """Return ``value`` as a finite float within ``[minimum, maximum]``.

    Raises:
        TypeError: ``value`` is not a real number.
        ValueError: ``value`` is not finite or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {short(value)} of type {type(value).__name__}.")
    # Compared before the conversion, because an integer may be too large for a float.
    if not abs(value) <= sys.float_info.max or not minimum <= value <= maximum:
        raise ValueError(f"`{name}` must be a finite number {_span(minimum, maximum)}, got {short(value)}.")
    return float(value)


def check_int(name: str, value: Any, *, minimum: float = -math.inf, maximum: float = math.inf) -> int:
    """Return ``value`` as an int within ``[minimum, maximum]``.

    Raises:
        TypeError: ``value`` is not an integer.
        ValueError: ``value`` is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {short(value)} of type {type(value).__name__}.")
    if not minimum <= value <= maximum:
        raise ValueError(f"`{name}` must be an integer {_span(minimum, maximum)}, got {short(value)}.")
    return value


def check_instance(name: str, value: Any, kind: type | tuple[type, ...], *, hint: str = "") -> None:
    """Raise a ``TypeError`` unless ``value`` is of ``kind``.

    Args:
        name: name of the argument.
        value: value to check.
        kind: type or types.
        hint: sentence of advice at the end of the message.

    Raises:
        TypeError: ``value`` is of another type.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        allowed = " or ".join(_called(k) for k in kinds)
        raise TypeError(f"`{name}` must be {allowed}, got {type(value).__name__}.{hint and ' '}{hint}")


def _called(kind: type) -> str:
    """Return a type's name as its users write it."""
    if kind.__module__.partition(".")[0] == "torch":
        return f"torch.{kind.__name__}" if kind.__name__ == "Tensor" else f"torch.nn.{kind.__name__}"
    return "None" if kind is type(None) else kind.__name__


def check_choice(name: str, value: Any, allowed: Any) -> None:
    """Raise a ``ValueError`` that lists the allowed values unless ``value`` is one of them."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {sorted(allowed)}, got {short(value)}.")


def check_shape(shape: Any) -> tuple[int, int, int]:
    """Return ``shape`` as ``(C, H, W)``, three positive integers; errors call it ``input_shape``.

    Raises:
        TypeError: a size is not an integer.
        ValueError: there are not three sizes, or one is not positive.
    """
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence) or len(shape) != 3:
        raise ValueError(
            f"`input_shape` must be three integers (channels, height, width), got {short(shape)}."
        )
    channels, height, width = (check_int("input_shape", size, minimum=1) for size in shape)
    return channels, height, width


def _span(minimum: float, maximum: float) -> str:
    low, high = (f"{bound:g}" if isinstance(bound, float) else str(bound) for bound in (minimum, maximum))
    if maximum == math.inf:
        return f">= {low}" if minimum != -math.inf else ""
    return f"in [{low}, {high}]"
