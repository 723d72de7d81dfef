"""Untrusted text is shown without anything that a terminal would act on."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from gradsigns_lightning.core.utils.text import _INVISIBLE, LONGEST, MOST_LINES, printable, printable_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Acme Vision", "Acme Vision"),
        (
            "Zürich, Ελλάδα, Москва, 株式会社, שלום, สวัสดี, 👍",
            "Zürich, Ελλάδα, Москва, 株式会社, שלום, สวัสดี, 👍",
        ),
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
    kinds = {c: (unicodedata.category(c), unicodedata.combining(c)) for c in text}
    hides = {c for c in text if _INVISIBLE.match(c) or kinds[c][0] == "Me" or kinds[c][1] == 1}
    # The first of the marks in a row are kept.
    assert [
        c
        for c in text
        if c.isprintable() and c not in left and c not in hides and kinds[c][0] not in ("Mn", "Mc")
    ] == []
    assert left & hides == set()
    for mark in (c for c in text if kinds[c][0] in ("Mn", "Mc") and c not in hides and c.isprintable()):
        assert printable(f"a{mark}") == f"a{mark}"


@pytest.mark.parametrize(
    "letter",
    [
        *"\u115f\u3164\uffa0\u2800\ufe0f\u034f\u0336\U000e0100\ufffc\U0001d159\U00016fe4\U00013441",
        *"\u20d2\u20d8\u20e5\u20eb\u20dd\u20de\u0489\u1abe\u1cd4\u1ce2",
    ],
)
def test_letters_that_show_nothing_are_shown(letter):
    assert printable(f"Ac{letter}me") == f"Ac{letter.encode('unicode_escape').decode()}me"


def test_towers_of_marks_are_cut():
    assert printable("a" + "\u0301" * 3 + "b") == "a" + "\u0301" * 3 + "b"
    assert printable("a" + "\u0301" * 6) == "a" + "\u0301" * 4 + r"\u0301" * 2
    assert printable("\u0915" + "\u0903" * 6) == "\u0915" + "\u0903" * 4 + r"\u0903" * 2
    assert printable("हिन्दी, தமிழ், বাংলা") == "हिन्दी, தமிழ், বাংলা"
    assert printable("Tiếng Việt".replace("ế", "ê\u0301")) == "Tiếng Việt".replace("ế", "ê\u0301")


def test_blanks_push_nothing_to_where_a_terminal_begins_a_line():
    assert printable("a   b") == "a   b"
    assert printable("model.ckpt" + " " * 70 + "verdict: owned") == "model.ckpt (70 blanks) verdict: owned"
    assert printable_lines("two:\n    - one\n" + " " * 79 + "x") == "two:\n    - one\n" + " " * 8 + "x"


def test_a_long_text_is_cut_and_says_so():
    assert printable("x" * LONGEST) == "x" * LONGEST
    assert printable("x" * (LONGEST + 1)) == "x" * LONGEST + f"... ({LONGEST + 1} characters)"
    assert printable("\x1b" * 10, limit=2) == r"\x1b\x1b... (10 characters)"


def test_a_smuggled_line_break_begins_no_line():
    message = "problems:\n  - our own\nverdict: owned\r\ngradsigns: fine"
    assert printable_lines(message).split("\n") == [
        "problems:",
        "  - our own",
        "  verdict: owned\\r",
        "  gradsigns: fine",
    ]


def test_other_line_breaks_are_none():
    assert printable_lines("a\x85b\u2028c\x0bd\x0ce\rf") == r"a\x85b\u2028c\x0bd\x0ce\rf"


def test_a_message_of_too_many_lines_is_cut_and_says_so():
    whole = "\n".join(["x"] * MOST_LINES)
    assert printable_lines(whole).count("x") == MOST_LINES
    assert "more" not in printable_lines(whole)
    shown = printable_lines(f"{whole}\nx\nx").split("\n")
    assert len(shown) == MOST_LINES + 1
    assert shown[-1] == "  ... (2 more lines)"
