"""``gradsigns trace``."""

from __future__ import annotations

from typing import Any

from gradsigns_lightning.cli.build import to_plain
from gradsigns_lightning.cli.report import check_json_path, format_p_value, matches, print_rows, write_json
from gradsigns_lightning.cli.suspect import open_suspect, suspect_images
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.extraction import trace


def run(config: Any) -> None:
    """Tell which customer's copy the suspect is, and report; the verdict does not change the exit code.

    Raises:
        ValueError: suspect, key and images do not fit together.
    """
    settings = to_plain(config)
    check_json_path(settings["json"])
    master = WatermarkKey.load(settings["key"]["path"])
    suspect = open_suspect(settings, master)
    images = suspect_images(settings, "trace", master, suspect.data_name)
    result = trace(
        suspect.model,
        master,
        images,
        n_customers=settings["n_customers"],
        alpha=settings["alpha"],
        max_queries=settings["api"]["max_queries"],
    )
    rows = {
        "verdict": result.verdict.replace("_", " "),
        "customer": str(result.customer) if result.verdict == "owned" else f"none (nearest is {result.customer})",
        "matching bits": matches(result),
        "next best": f"{result.next_n_matches} bits",
        "p-value": f"{format_p_value(result)} for {result.n_customers} customers (owned at <= {result.alpha:g})",
        "images read": str(result.n_queries),
        suspect.kind: suspect.source,
        "commitment": result.commitment,
    }
    print_rows(rows, title="gradsigns trace")
    if settings["json"]:
        write_json(settings["json"], {**result.to_dict(), suspect.kind: suspect.source, "key": settings["key"]["path"]})
