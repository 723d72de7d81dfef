"""``gradsigns judge``."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from gradsigns_lightning.cli.build import to_plain
from gradsigns_lightning.cli.commit import read_bytes
from gradsigns_lightning.cli.report import check_json_path, format_p_value, matches, print_rows, write_json
from gradsigns_lightning.cli.suspect import open_control, open_suspect, suspect_images
from gradsigns_lightning.extraction.evidence import Bundle, Judgement, judge


def run(config: Any) -> None:
    """Check an evidence bundle, read the suspect and the controls, and report; the verdict does not change the exit code.

    Raises:
        ValueError: the bundle is not genuine, or a file cannot be read.
    """
    settings = to_plain(config)
    check_json_path(settings["json"])
    bundle = Bundle.load(settings["bundle"])
    named = any(settings[kind] is not None for kind in ("checkpoint", "onnx", "endpoint"))
    suspect = open_suspect(settings, bundle.key) if named else None
    images = None
    if suspect is not None or settings["controls"]:
        images = suspect_images(settings, "judge", bundle.key, suspect.data_name if suspect else None)
    authority = settings["authority"]
    judgement = judge(
        bundle,
        suspect=suspect.model if suspect else None,
        images=images,
        controls={path: open_control(path, bundle.key) for path in settings["controls"]},
        authority=read_bytes(Path(authority), "authority") if authority else None,
        suspect_since=_time(settings["suspect_since"]),
        grinding_bits=settings["grinding_bits"],
        alpha=settings["alpha"],
        max_queries=settings["api"]["max_queries"],
    )
    print_rows(_rows(judgement), title="gradsigns judge", note=_note(judgement))
    if settings["json"]:
        write_json(settings["json"], {**judgement.to_dict(), "bundle": settings["bundle"]})


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"`suspect_since` must be a time such as 2026-11-23T00:00:00+00:00, got {text!r}.") from error
    return time


def _rows(judgement: Judgement) -> dict[str, str]:
    dated = {None: "", True: ", before the suspect", False: ", not known to be before the suspect"}[judgement.precedes_suspect]
    rows = {
        "verdict": judgement.verdict.replace("_", " "),
        "owner": judgement.owner,
        "commitment": judgement.commitment,
        "committed at": (judgement.committed_at.isoformat() if judgement.committed_at else "not known") + dated,
    }
    for name, result in (("own reading", judgement.reading), ("claimant's reading", judgement.transcript)):
        if result is not None:
            rows[name] = f"{matches(result)}, p = {format_p_value(result)}"
    rows |= {f"control {name}": f"{matches(result)}, p = {format_p_value(result)}" for name, result in judgement.controls.items()}
    rows["raw p-value"] = _power(judgement.log10_p_value)
    trials = f"2^{judgement.grinding_bits:g} keys tried"
    if judgement.payload_bits and not judgement.precedes_suspect:
        trials += f", payload of {judgement.payload_bits:g} bits"
    rows["adjusted p-value"] = f"{_power(judgement.log10_adjusted_p_value)} for {trials} (owned at <= {judgement.alpha:g})"
    return rows


def _power(log10: float) -> str:
    return f"10^{log10:.1f}" if log10 <= -300 else f"{10**log10:.3g}"


def _note(judgement: Judgement) -> str:
    notes = [f"Against the claim: {objection}." for objection in judgement.objections]
    if judgement.reading is None:
        notes.append("The answers are what the claimant says they were; name the suspect to ask it yourself.")
    if judgement.precedes_suspect is None:
        notes.append("Whether the key is older than the suspect was not asked: authority=... suspect_since=...")
    return "\n".join(notes)
