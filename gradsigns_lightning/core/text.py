"""Text that others wrote, as it may be shown: an owner's name, a file's, a server's answer, a library's error."""

from __future__ import annotations

import re

LONGEST = 1000  # characters of one line: more than any name has, less than a screen
MOST_LINES = 100
_INDENT = "  "
# Printable to Python, but without a mark of its own: what Unicode lets fonts ignore, blank letters, strokes through the next one.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0\ufe00-\ufe0f\u0335-\u0338\U000e0100-\U000e01ef]"
)


def printable(text: str, *, limit: int = LONGEST) -> str:
    r"""Return ``text`` in one line without any character that a terminal or a log would act on.

    Letters of all scripts stay as they are. What ``str.isprintable`` rejects (control characters, line breaks, marks that turn
    the direction of writing, characters without width, lone surrogates) is shown as ``repr`` shows it. A backslash stays, so the
    result is for people to read, not for a program to turn back.

    Args:
        text: what somebody else wrote.
        limit: characters that are shown; of a longer text the beginning and how long it is.

    Example:
        >>> print(printable("Acme\x1b[2K\rVision, Zürich"))
        Acme\x1b[2K\rVision, Zürich
        >>> printable("a" * 2000, limit=5)
        'aaaaa... (2000 characters)'
    """
    shown = _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text[:limit])
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
    return shown if len(text) <= limit else f"{shown}... ({len(text)} characters)"


def printable_lines(text: str) -> str:
    r"""Return a message of one or several lines, each :func:`printable`; all but the first are indented.

    A line break that somebody smuggled into a message so cannot begin a line that looks like a message of its own.

    Example:
        >>> print(printable_lines("two problems:\n  - one\nverdict: owned"))
        two problems:
          - one
          verdict: owned
    """
    lines = text.split("\n")
    left = [f"... ({len(lines) - MOST_LINES} more lines)"] if len(lines) > MOST_LINES else []
    first, *others = map(printable, [*lines[:MOST_LINES], *left])
    return "\n".join([first, *(line if line.startswith(_INDENT) else _INDENT + line for line in others)])
