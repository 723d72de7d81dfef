"""``gradsigns benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from gradsigns_lightning.benchmark.cells import CellRecord, run_cell
from gradsigns_lightning.cli.attack import accuracy_of, curve_rows, mark_of, point_row, who_wins
from gradsigns_lightning.cli.runner import Outcome
from gradsigns_lightning.cli.tables import check_json_path, print_rows, short_path, write_json
from gradsigns_lightning.runs.own import settings_of

# What stands in the record by itself, or decides nothing that is measured.
_NAMED = {
    *("scheme", "attack", "data", "model", "seed", "folder", "json", "retry"),
    *("paths.data", "data.module.root", "data.module.num_workers"),
    *("hydra/launcher", "trainer.accelerator"),
}


def run(config: Any) -> Outcome:
    """Run one cell of the benchmark, or return it if it is there.

    Returns:
        What a sweep shows of it.

    Raises:
        ValueError: a setting is out of range.
    """
    choices = HydraConfig.get().runtime.choices
    settings = settings_of(config, choices)
    check_json_path(settings["json"])
    names = {group: choices[group] for group in ("scheme", "attack", "data", "model")}
    names |= {"seed": settings["seed"], "with": _further_words()}
    folder = Path(settings["folder"]).expanduser()
    cell = run_cell(settings, names, folder, retry=settings["retry"])
    print_rows(_rows(cell, folder), title="gradsigns benchmark")
    if settings["json"]:
        write_json(settings["json"], cell.to_dict())
    return Outcome(None if cell.record else cell.status, cell=_cell(cell))


def _further_words() -> str:
    """Return what else was typed that a cell depends on, so that a report keeps apart what differs in it."""
    words = HydraConfig.get().overrides.task
    return " ".join(sorted(word for word in words if word.partition("=")[0].lstrip("+") not in _NAMED))


def _last_line(cell: CellRecord) -> str:
    lines = (cell.error or "").strip().splitlines()
    return lines[-1] if lines else ""


def _rows(cell: CellRecord, folder: Path) -> dict[str, str]:
    chosen = {"cell": ", ".join(f"{name} {value}" for name, value in cell.names.items() if value != "")}
    kept = {"record": short_path(folder / "cells" / f"{cell.cell}.json")}
    if cell.record is None:
        return {**chosen, "status": cell.status, "error": _last_line(cell), **kept}
    record = cell.record
    return {
        **chosen,
        "before": point_row(record.before),
        **curve_rows(record),
        "after": point_row(record.after),
        "thief": f"{who_wins(record)}; {record.seconds:.1f} seconds, {record.n_images} images",
        **kept,
    }


def _cell(cell: CellRecord) -> dict[str, str]:
    if cell.record is None:
        return {"accuracy": "", "mark": cell.status, "thief": ""}
    after = cell.record.after
    return {"accuracy": accuracy_of(after), "mark": mark_of(after), "thief": who_wins(cell.record)}
