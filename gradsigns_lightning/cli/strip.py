"""``gradsigns strip``."""

from __future__ import annotations

from typing import Any

from gradsigns_lightning.cli.build import to_plain
from gradsigns_lightning.cli.report import check_json_path, print_rows, write_json
from gradsigns_lightning.integration.release import strip


def run(config: Any) -> None:
    """Write a copy of a checkpoint in which nothing announces the mark, and say what was left out.

    Raises:
        ValueError: the checkpoint cannot be read, or the copy not be written.
    """
    settings = to_plain(config)
    check_json_path(settings["json"])
    removed = strip(settings["checkpoint"], settings["out"], overwrite=settings["overwrite"])
    rows = {"checkpoint": settings["checkpoint"], "copy": settings["out"]}
    rows |= {f"left out {number}": name for number, name in enumerate(removed, 1)}
    note = "Keep the original and the key; `gradsigns verify` needs the description that was left out."
    print_rows(rows, title="gradsigns strip", note=note if removed else "Nothing in it announced a mark.")
    if settings["json"]:
        write_json(settings["json"], {"checkpoint": settings["checkpoint"], "out": settings["out"], "removed": list(removed)})
