"""Makes untrusted text safe to print: owners' names, file names, servers' replies, libraries' errors."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

LONGEST = 1000  # characters of one line: more than any name has, less than a screen
MOST_LINES = 100
_INDENT = "  "
# Combining marks on one letter. Vietnamese needs two, pointed Hebrew three; towers of them reach other lines.
_MOST_MARKS = 4
_OVERLAY = 1  # Unicode's combining class of strokes through a letter
# Printable to Python but invisible: characters that fonts may ignore (Python lacks Unicode's property
# Default_Ignorable_Code_Point), and blank letters.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0\ufe00-\ufe0f\ufffc\U00013441\U00013442\U00016fe4\U0001d159"
    "\U000e0100-\U000e01ef]"
)
_BLANKS = re.compile(" {4,}")
_DEEPEST = 8  # largest indentation of a line of a message


def printable(text: str, *, limit: int = LONGEST) -> str:
    r"""Return ``text`` as one line without any character on which a terminal or a log would act.

    Letters of all scripts stay as they are. What ``str.isprintable`` rejects (control characters, line
    breaks, marks that change the direction of writing, zero-width characters, lone surrogates) is shown as
    ``repr`` shows it, and so are blank letters and marks that enclose or strike out others. Four or more
    blanks are replaced by their number, because they could move what follows to the start of a terminal's
    line. Backslashes stay, so the result is meant for people and cannot be decoded.

    Args:
        text: untrusted text.
        limit: largest number of characters shown; a longer text is cut, and its length added.

    Example:
        >>> print(printable("Acme\x1b[2K\rVision, Zürich"))
        Acme\x1b[2K\rVision, Zürich
        >>> printable("a" * 2000, limit=5)
        'aaaaa... (2000 characters)'
    """
    shown = _BLANKS.sub(lambda found: f" ({len(found[0])} blanks) ", text[:limit])
    if not (shown.isascii() and shown.isprintable()):
        shown = "".join(_escaped(shown))
    return shown if len(text) <= limit else f"{shown}... ({len(text)} characters)"


def _escaped(text: str) -> Iterator[str]:
    n_marks = 0
    for character in text:
        is_mark = unicodedata.category(character) in ("Mn", "Mc", "Me")
        n_marks = n_marks + 1 if is_mark else 0
        hides = _INVISIBLE.match(character) or unicodedata.combining(character) == _OVERLAY
        if (
            character.isprintable()
            and not hides
            and unicodedata.category(character) != "Me"
            and n_marks <= _MOST_MARKS
        ):
            yield character
        else:
            yield character.encode("unicode_escape", "surrogatepass").decode()


def printable_lines(text: str) -> str:
    r"""Return a message of one or more lines, each :func:`printable`; all but the first are indented.

    So a line break smuggled into a message cannot begin a line that looks like another message.

    Example:
        >>> print(printable_lines("two problems:\n  - one\nverdict: owned"))
        two problems:
          - one
          verdict: owned
    """
    lines = text.split("\n")
    left = [f"... ({len(lines) - MOST_LINES} more lines)"] if len(lines) > MOST_LINES else []
    first, *others = map(_printable_line, [*lines[:MOST_LINES], *left])
    return "\n".join([first, *(line if line.startswith(_INDENT) else _INDENT + line for line in others)])


def _printable_line(line: str) -> str:
    words = line.lstrip(" ")
    return " " * min(len(line) - len(words), _DEEPEST) + printable(words)
