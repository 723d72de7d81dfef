import math

import pytest

from gradsigns_lightning.benchmark import AttackRecord, Point, Reading
from gradsigns_lightning.benchmark.cells import CellRecord
from gradsigns_lightning.reporting.survival import survival_page, write_page

PROVEN = Reading(128, 128, 0, -38.5, 11.0, "owned", 100)
GONE = Reading(128, 66, 0, -0.5, 0.3, "not_proven", 100)
BLANK = Reading(128, 0, 128, math.nan, math.nan, "inconclusive", 100)


def cell(scheme, attack, seed, after, lost, *, curve=()):
    record = AttackRecord(
        "X", {}, "model", Point(0, 0.9, PROVEN), Point(5, 0.9 - lost, after), curve, 1.0, 300
    )
    names = {"scheme": scheme, "attack": attack, "seed": seed, "data": "digits", "model": "mlp"}
    return CellRecord(f"{scheme}{attack}{seed}", names, "done", record, None, 1.0)


CELLS = [
    *(cell("ours", "ftal", seed, PROVEN, 0.01 * seed, curve=(Point(1, 0.9, PROVEN),)) for seed in range(3)),
    *(cell("adi", "ftal", seed, GONE if seed else PROVEN, 0.01) for seed in range(3)),
    *(cell("ours", "prune", seed, GONE, 0.2) for seed in range(3)),
    cell("adi", "prune", 0, BLANK, 0.0),
    CellRecord(
        "x", {"scheme": "adi", "attack": "jpeg", "seed": 0, "data": "digits", "model": "mlp"},
        "crashed", None, "Traceback\nRuntimeError: out of memory\n", 1.0,
    ),
]  # fmt: skip


def rows(page):
    found = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    return {line[0].strip(): [entry.strip() for entry in line[1:]] for line in found}


def test_each_attack_is_a_row_and_each_scheme_a_column():
    table = rows(survival_page(CELLS))
    assert table["attack (3 seeds)"] == ["adi", "ours"]
    assert table["before any attack"] == ["-38.5 ± 0.0; accuracy 90.0 ± 0.0 %"] * 2
    assert table["ftal"] == ["🔴 -13.2 ± 21.9; +1.0 ± 0.0", "🟢 -38.5 ± 0.0; +1.0 ± 1.0"]
    assert table["prune"] == ["🔴 -; +0.0", "🟡 -0.5 ± 0.0; +20.0 ± 0.0"]


def test_a_mark_that_was_never_there_is_neither_lost_nor_kept():
    before = Point(0, 0.9, GONE)
    record = AttackRecord("X", {}, "model", before, before, (), 1.0, 300)
    names = {"scheme": "none", "attack": "ftal", "seed": 0, "data": "digits", "model": "mlp"}
    page = survival_page([CellRecord("x", names, "done", record, None, 1.0)])
    assert rows(page)["ftal"] == ["⚪ -0.5; +0.0"]


@pytest.mark.parametrize("kinds", [("responses",), ("responses", "model"), ("model", "responses")])
def test_models_are_shown_as_their_weights_read_where_those_were_read(kinds):
    found = []
    for kind in kinds:
        before = Point(0, 0.9, PROVEN if kind == "model" else GONE)
        names = {"scheme": "ours", "attack": kind, "seed": 0, "data": "digits", "model": "mlp"}
        record = AttackRecord("X", {}, kind, before, before, (), 1.0, 300)
        found.append(CellRecord(kind, names, "done", record, None, 1.0))
    expected = "-38.5" if "model" in kinds else "-0.5"
    assert rows(survival_page(found))["before any attack"] == [f"{expected}; accuracy 90.0 %"]


def test_what_crashed_is_told_with_its_reason():
    page = survival_page(CELLS, command="gradsigns benchmark -m")
    assert "attack jpeg, seed 0, data digits, model mlp: crashed, RuntimeError: out of memory" in page
    assert "Made by `gradsigns benchmark -m`." in page


def test_nothing_is_made_of_no_records(tmp_path):
    with pytest.raises(ValueError, match="`folder` must hold records"):
        write_page([], tmp_path / "page.md")
    assert list(tmp_path.iterdir()) == []


def test_the_page_comes_with_its_figures(tmp_path):
    files = write_page(CELLS, tmp_path / "page.md")
    assert [file.name for file in files] == ["page.md", "survival-curves.svg", "survival-evidence.svg"]
    page = files[0].read_text()
    assert all(f"({file.name})" in page for file in files[1:])
    assert all("<svg" in file.read_text() for file in files[1:])
