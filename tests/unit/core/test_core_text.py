"""What others wrote is shown in letters only."""

from __future__ import annotations

import sys

import pytest

from gradsigns_lightning.core.text import _INVISIBLE, LONGEST, MOST_LINES, printable, printable_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Acme Vision", "Acme Vision"),
        ("Zürich, Ελλάδα, Москва, 株式会社, שלום, สวัสดี, 👍", "Zürich, Ελλάδα, Москва, 株式会社, שלום, สวัสดี, 👍"),
        ("C:\\keys\\a.gskey [red]'\"", "C:\\keys\\a.gskey [red]'\""),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("a\rb\nc\td", r"a\rb\nc\td"),
        ("\x00\x7f\x85\x9b", r"\x00\x7f\x85\x9b"),
        ("\u202egpj.exe\u2066\u200f", r"\u202egpj.exe\u2066\u200f"),
        ("no\u200bwidth\u00a0\ufeff", r"no\u200bwidth\xa0\ufeff"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\ud800 and \udcff", r"\ud800 and \udcff"),
        ("\U000e0041\U0010ffff", r"\U000e0041\U0010ffff"),
        ("", ""),
    ],
)
def test_what_a_terminal_would_act_on_is_escaped_and_letters_stay(text, shown):
    assert printable(text) == shown


def test_the_whole_of_unicode_becomes_printable():
    text = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = printable(text, limit=len(text))
    assert shown.isprintable()
    assert shown.encode("utf-8").decode("utf-8") == shown
    left = set(shown)
    assert [c for c in text if c.isprintable() and c not in left and not _INVISIBLE.match(c)] == []


@pytest.mark.parametrize("letter", ["\u115f", "\u3164", "\uffa0", "\u2800", "\ufe0f", "\u034f", "\u0336", "\U000e0100"])
def test_letters_that_show_nothing_are_shown(letter):
    assert printable(f"Ac{letter}me") == f"Ac{letter.encode('unicode_escape').decode()}me"


def test_a_long_text_is_cut_and_says_so():
    assert printable("x" * LONGEST) == "x" * LONGEST
    assert printable("x" * (LONGEST + 1)) == "x" * LONGEST + f"... ({LONGEST + 1} characters)"
    assert printable("\x1b" * 10, limit=2) == r"\x1b\x1b... (10 characters)"


def test_a_smuggled_line_break_begins_no_line():
    message = "problems:\n  - our own\nverdict: owned\r\ngradsigns: fine"
    assert printable_lines(message).split("\n") == ["problems:", "  - our own", "  verdict: owned\\r", "  gradsigns: fine"]


def test_other_line_breaks_are_none():
    assert printable_lines("a\x85b\u2028c\x0bd\x0ce\rf") == r"a\x85b\u2028c\x0bd\x0ce\rf"


def test_a_message_of_too_many_lines_is_cut_and_says_so():
    whole = "\n".join(["x"] * MOST_LINES)
    assert printable_lines(whole).count("x") == MOST_LINES
    assert "more" not in printable_lines(whole)
    shown = printable_lines(f"{whole}\nx\nx").split("\n")
    assert len(shown) == MOST_LINES + 1
    assert shown[-1] == "  ... (2 more lines)"
