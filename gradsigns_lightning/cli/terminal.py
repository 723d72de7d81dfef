"""Wraps messages for a terminal, which would continue a full line at its left margin."""

from __future__ import annotations

import os
import shutil
import unicodedata
from typing import IO

_INDENT = "  "
_NARROWEST = 20


def for_stream(text: str, stream: IO[str]) -> str:
    """Return ``text`` as it is, or wrapped with :func:`hanging` if ``stream`` is a terminal."""
    if not stream.isatty():
        return text
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except OSError:
        columns = 0
    return hanging(text, (columns or shutil.get_terminal_size().columns) - 1)


def hanging(text: str, width: int) -> str:
    """Wrap lines longer than ``width`` columns; continuations are indented by two columns or more.

    Thus a file's or owner's name that is as long as the terminal is wide cannot begin a line that looks like
    a message of its own.

    Example:
        >>> print(hanging("gradsigns: got 'x.ckpt.........verdict: owned'", 31))
        gradsigns: got 'x.ckpt.........
          verdict: owned'
    """
    width = max(width, _NARROWEST)
    lines: list[str] = []
    for line in text.split("\n"):
        indent = _INDENT + " " * min(len(line) - len(line.lstrip(" ")), width // 4)
        rest = line
        while (end := _fitting(rest, width)) < len(rest):
            blank = rest.rfind(" ", width // 2, end + 1)
            lines.append(rest[: end if blank < 0 else blank].rstrip(" "))
            rest = indent + rest[end if blank < 0 else blank :].lstrip(" ")
        lines.append(rest)
    return "\n".join(lines)


def for_cell(text: str, width: int) -> str:
    """Return ``text``, escaped to ASCII if a terminal may show it wider than both ``width`` and rich's count.

    Rich breaks the lines of a table where it considers them full. One that is longer on a terminal continues
    at its left margin.
    """
    from rich.cells import cell_len

    columns = sum(map(_columns, text))
    return (
        text if columns <= max(width, cell_len(text)) else text.encode("ascii", "backslashreplace").decode()
    )


def _fitting(line: str, width: int) -> int:
    """Return how many characters of ``line`` fit into ``width`` columns."""
    columns = 0
    for position, character in enumerate(line):
        columns += _columns(character)
        if columns > width:
            return position
    return len(line)


def _columns(character: str) -> int:
    """Return the most columns that a terminal gives a character; rich gives spacing marks none."""
    from rich.cells import get_character_cell_size

    if character.isascii() or unicodedata.category(character) in ("Mn", "Me"):
        return get_character_cell_size(character)
    return max(
        get_character_cell_size(character), 2 if unicodedata.east_asian_width(character) in "WF" else 1
    )
