"""``gradsigns report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradsigns_lightning.benchmark.cells import read_cells
from gradsigns_lightning.cli.runner import Outcome
from gradsigns_lightning.cli.tables import check_json_path, print_rows, short_path, write_json
from gradsigns_lightning.reporting.survival import write_page
from gradsigns_lightning.runs.build import to_plain


def run(config: Any) -> Outcome:
    """Write a page with a table and figures of the benchmark's records.

    Returns:
        What a sweep shows of it.

    Raises:
        ValueError: there is no record, or the page cannot be written.
    """
    settings = to_plain(config)
    check_json_path(settings["json"])
    out = Path(settings["out"]).expanduser()
    if out.suffix != ".md" or not out.parent.is_dir():
        raise ValueError(f"`out` must name a file .md in an existing folder, got {str(out)!r}.")
    cells = read_cells(Path(settings["folder"]).expanduser())
    files = write_page(cells, out)
    rows = {"cells": str(len(cells)), **{f"file {i}": short_path(file) for i, file in enumerate(files, 1)}}
    print_rows(rows, title="gradsigns report")
    if settings["json"]:
        write_json(settings["json"], {"files": [str(file) for file in files], "n_cells": len(cells)})
    return Outcome(cell={"page": str(out)})
