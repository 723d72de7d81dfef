"""Checks of the values that a received file states: exact types and bounds, and shortened foreign text.

The checks of :mod:`gradsigns_lightning.core.utils.checks` are for arguments, whose author may see all of
them. A file may come from anyone, so here an instance of a subclass is not an integer, and nothing is shown
that could fill the screen or be costly to format.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

_LONGEST = 80
Check = Callable[[str, Any], Any]


def shown(value: Any) -> str:
    """Return ``value`` for a message: a plain value by its shortened ``repr``, any other by its type."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _LONGEST else f"{value[:_LONGEST]!r}... ({len(value)} characters)"
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() <= 64 else f"an integer of {value.bit_length()} bits"
    return type(value).__name__


def whole(minimum: int, maximum: int) -> Check:
    """Return the check of an integer in ``[minimum, maximum]``."""

    def check(name: str, value: Any) -> int:
        if type(value) is not int or not minimum <= value <= maximum:
            raise ValueError(
                f"`checkpoint`: its `{name}` must be an integer in [{minimum}, {maximum}], got "
                f"{shown(value)}."
            )
        return value

    return check


def real(minimum: float, maximum: float, *, above: bool = False) -> Check:
    """Return the check of a finite number in ``[minimum, maximum]``; ``above`` excludes ``minimum``."""

    def check(name: str, value: Any) -> float:
        finite = (
            math.isfinite(value) if type(value) is float else type(value) is int and value.bit_length() <= 64
        )
        if not finite or not minimum <= value <= maximum or (above and value == minimum):
            span = f"{'(' if above else '['}{minimum:g}, {maximum:g}]"
            raise ValueError(f"`checkpoint`: its `{name}` must be a number in {span}, got {shown(value)}.")
        return float(value)

    return check


def each(check: Check, *, shortest: int, longest: int) -> Check:
    """Return the check of a list or tuple of ``shortest`` to ``longest`` values that ``check`` takes."""

    def check_all(name: str, value: Any) -> tuple[Any, ...]:
        if type(value) not in (list, tuple) or not shortest <= len(value) <= longest:
            count = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
            found = f"{len(value)} of them" if type(value) in (list, tuple) else shown(value)
            raise ValueError(f"`checkpoint`: its `{name}` must be a list of length {count}, got {found}.")
        return tuple(check(name, entry) for entry in value)

    return check_all


def one_of(allowed: Callable[[], Any], what: str) -> Check:
    """Return the check of a value that equals one of ``allowed()``, in type too; ``what`` names them."""

    def check(name: str, value: Any) -> Any:
        if not any(type(value) is type(entry) and value == entry for entry in allowed()):
            raise ValueError(f"`checkpoint`: its `{name}` must be {what}, got {shown(value)}.")
        return value

    return check


def mapping(value: Any, what: str) -> dict[Any, Any]:
    """Return ``value`` as a plain dictionary.

    Raises:
        ValueError: it is not a dictionary; the message calls it ``what``.
    """
    if not isinstance(value, dict):
        raise ValueError(f"`checkpoint`: its {what} must be a dictionary, got {shown(value)}.")
    return dict(dict.items(value))  # a file may have put attributes on a subclass that hide its methods
