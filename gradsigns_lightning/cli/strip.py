"""``gradsigns strip``."""

from __future__ import annotations

from typing import Any

from gradsigns_lightning.cli.runner import Outcome
from gradsigns_lightning.cli.tables import check_json_path, print_rows, write_json
from gradsigns_lightning.core.utils.text import printable
from gradsigns_lightning.integration.release import strip
from gradsigns_lightning.runs.build import to_plain

# How many names are shown, and how much of each: every line of a table is as long as its longest.
_MOST_SHOWN, _LONGEST_SHOWN = 100, 300


def run(config: Any) -> Outcome:
    """Write a copy of a checkpoint in which nothing announces the mark, and say what was left out.

    Returns:
        The outcome for a sweep's table.

    Raises:
        ValueError: the checkpoint cannot be read, or the copy cannot be written.
    """
    settings = to_plain(config)
    check_json_path(settings["json"])
    removed = strip(settings["checkpoint"], settings["out"], overwrite=settings["overwrite"])
    rows = {"checkpoint": settings["checkpoint"], "copy": settings["out"]}
    rows |= {
        f"left out {number}": printable(name, limit=_LONGEST_SHOWN)
        for number, name in enumerate(removed[:_MOST_SHOWN], 1)
    }
    if len(removed) > _MOST_SHOWN:
        rows["left out besides"] = f"{len(removed) - _MOST_SHOWN} more of the same kind"
    print_rows(rows, title="gradsigns strip", note=_note(removed))
    if settings["json"]:
        write_json(
            settings["json"],
            {"checkpoint": settings["checkpoint"], "out": settings["out"], "removed": list(removed)},
        )
    return Outcome(cell={"copy": settings["out"], "left out": f"{len(removed)} entries"})


def _note(removed: tuple[str, ...]) -> str:
    if not removed:
        return "Nothing in it announced a mark."
    described = any(name.startswith("hyper_parameters") for name in removed)
    needed = (
        "`gradsigns verify` needs the description that was left out"
        if described
        else "training can be resumed from it alone"
    )
    return f"Keep the original and the key; {needed}."
