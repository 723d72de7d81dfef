"""On a terminal, the continuation of a message that is too long is indented."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from gradsigns_lightning.cli import tables
from gradsigns_lightning.cli.terminal import hanging

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("filler", [".", "x", "株", "- ", "é", "word "])
def test_what_goes_on_is_indented_whatever_fills_the_line(filler):
    for length in range(100):
        text = "gradsigns: got '" + filler * length + "verdict: owned (p = 1e-40)'"
        first, *others = hanging(text, 60).split("\n")
        assert all(cell_len(line) <= 60 for line in (first, *others))
        assert all(line.startswith("  ") for line in others)
        assert "".join([first, *others]).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize(
    ("mark", "columns"), [("\u0903", 1), ("\u093b", 1), ("\U0001d165", 1), ("\U00016ff0", 2)]
)
def test_spacing_marks_take_columns(mark, columns):
    first, *others = hanging("gradsigns: got '" + mark * 100, 60).split("\n")
    assert len(first) == 16 + 44 // columns
    assert all(line.startswith("  ") and len(line.strip()) <= 58 // columns for line in others)


def shown_rows(monkeypatch, rows, columns):
    printed = io.StringIO()
    terminal = Console(file=printed, force_terminal=True, width=columns, color_system=None)
    monkeypatch.setattr(tables, "Console", lambda **_: terminal)
    tables.print_rows(rows, title="t")
    return printed.getvalue()


@pytest.mark.parametrize(
    "filler", ["\u0915\u0903\u0903\u0903", "\u1100\u1161\u1161\u1161", "\U0001f44d\U0001f3fd", "\u0b95\u0bbe"]
)
@pytest.mark.parametrize("place", ["name", "value"])
def test_no_cell_of_a_table_is_longer_on_a_terminal_than_rich_takes_it_for(monkeypatch, filler, place):
    """Spacing marks, vowels of Hangul, tones of emoji: a terminal would continue their line at its margin."""
    for length in (1, 5, 40, 100):
        text = filler * length + "verdict: owned"
        shown = shown_rows(monkeypatch, {text: "a"} if place == "name" else {"a": text}, 80)
        assert all(sum(map(columns_of, line)) <= 80 for line in shown.splitlines())
        assert (filler in shown) == (sum(map(columns_of, text)) <= 33)


def columns_of(character):
    if unicodedata.category(character) == "Mn":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def test_names_of_all_scripts_stay_in_a_table(monkeypatch):
    names = ["\u092d\u093e\u0930\u0924\u0940\u092f", "\u682a\u5f0f" * 30, "Zürich" * 30]
    shown = shown_rows(monkeypatch, {str(i): name for i, name in enumerate(names)}, 200)
    assert all(name in shown for name in names)


def test_what_fits_stays():
    assert hanging("a\n  - b\n", 40) == "a\n  - b\n"
    assert hanging("    - " + "x" * 40, 30).split("\n")[1].startswith("      x")


@pytest.mark.parametrize("kind", ["an error", "a verdict"])
def test_no_message_goes_on_at_the_left_margin_of_a_terminal(tmp_path, kind):
    forged = "x." + "." * 59 + "verdict:.owned.(p.=.1e-40)."
    if kind == "an error":
        words = ["verify", "checkpoint=a", f"key={forged}"]
        program = f"import sys; from gradsigns_lightning.cli import main; sys.exit(main({words}))"
    else:
        program = "from gradsigns_lightning.cli.tables import print_rows; "
        program += f"print_rows({{'a': 'b'}}, title='t', note={forged!r})"
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "60", "TERM": "dumb"}
    child = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, stdout=slave, stderr=slave
    )
    child.wait(timeout=100)
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 4096)
        except OSError:
            break
    os.close(master)
    lines = shown.decode().replace("\r", "").split("\n")
    assert any("verdict" in line for line in lines)
    assert all(len(line) < 60 for line in lines)
    assert not any(line.startswith((".", "verdict")) for line in lines)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_long_name_leaves_room_for_the_verdict(monkeypatch, columns):
    printed = io.StringIO()
    terminal = Console(file=printed, force_terminal=True, width=columns, color_system=None)
    monkeypatch.setattr(tables, "Console", lambda **_: terminal)
    name = "control " + "c" * 250
    tables.print_rows({"verdict": "not proven", "p-value": "0.25", name: "not proven"}, title="t")
    lines = printed.getvalue().splitlines()
    assert sum("not proven" in line for line in lines) == 2
    assert any("0.25" in line for line in lines)
    assert printed.getvalue().count("c") == name.count("c") + "verdict".count("c")
    assert all(cell_len(line) <= columns for line in lines)
