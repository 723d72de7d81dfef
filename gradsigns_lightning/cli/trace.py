"""``gradsigns trace``."""

from __future__ import annotations

from typing import Any

from gradsigns_lightning.cli.runner import Outcome
from gradsigns_lightning.cli.tables import (
    as_sentence,
    check_json_path,
    format_p_value,
    matches,
    print_rows,
    write_json,
)
from gradsigns_lightning.runs.build import to_plain
from gradsigns_lightning.runs.options import api_names, load_key, options
from gradsigns_lightning.runs.suspect import check_normalization, open_suspect, suspect_images
from gradsigns_lightning.verification import TraceResult, trace


def run(config: Any) -> Outcome:
    """Tell which customer's copy the suspect is, and report.

    Returns:
        The verdict.

    Raises:
        ValueError: suspect, key and images do not fit together.
    """
    settings = to_plain(config)
    check_json_path(settings["json"])
    master = load_key(settings["key"]["path"])
    suspect = open_suspect(settings, master)
    check_normalization(suspect, master)
    images = suspect_images(settings, master, suspect.data_name)
    with options({**api_names(settings), "master": "key"}):
        result = trace(
            suspect.model,
            master,
            images.pixels,
            n_customers=settings["n_customers"],
            alpha=settings["alpha"],
            max_queries=settings["api"]["max_queries"],
        )
    rows = {
        "verdict": result.verdict.replace("_", " "),
        "customer": str(result.customer) if result.verdict == "owned" else "none",
        "marks present": _present(result),
        "matching bits": f"{matches(result)}, nearest customer; {result.next_n_matches}, the next",
        "p-value": f"{format_p_value(result)} for {result.n_customers} customers (owned at <= "
        f"{result.alpha:g})",
        "images read" if suspect.kind == "checkpoint" else "queries": str(result.n_queries),
        suspect.kind: suspect.source,
        **images.row(),
        f"{'customer' if result.verdict == 'owned' else 'nearest'}'s key's commitment": result.commitment,
    }
    print_rows(rows, title="gradsigns trace", note=_note(result))
    if settings["json"]:
        sources = {suspect.kind: suspect.source, "key": settings["key"]["path"]}
        write_json(settings["json"], {**result.to_dict(), **sources, **images.to_dict()})
    return Outcome(
        result.verdict,
        cell={name: rows[name] for name in ("verdict", "customer", "matching bits", "p-value")},
    )


def _present(result: TraceResult) -> str:
    names = [f"customer {number}" for number in result.present] + ["the master's own"] * result.is_master
    return ", ".join(names) or "none that could be proven"


def _note(result: TraceResult) -> str:
    if result.verdict == "owned":
        return ""
    why = f"{result.verdict.replace('_', ' ')}: {result.reason}"
    if result.verdict == "not_proven" and result.present:
        why += "; those named had a part in it"
    return as_sentence(why)
