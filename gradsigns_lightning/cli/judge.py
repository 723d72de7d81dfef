"""``gradsigns judge``."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from gradsigns_lightning.cli.commit import read_bytes
from gradsigns_lightning.cli.runner import Outcome
from gradsigns_lightning.cli.tables import (
    as_sentence,
    check_json_path,
    format_p_value,
    matches,
    power,
    print_rows,
    write_json,
)
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.key.signature_key import KeyAsRead
from gradsigns_lightning.evidence import Bundle, Judgement, judge
from gradsigns_lightning.runs.build import to_plain
from gradsigns_lightning.runs.options import api_names, options
from gradsigns_lightning.runs.suspect import Suspect, open_control, open_suspect, suspect_images


def run(config: Any) -> Outcome:
    """Check an evidence bundle, read the suspect and the controls, and report.

    Returns:
        The verdict.

    Raises:
        ValueError: the bundle is not genuine, or a file cannot be read.
    """
    settings = to_plain(config)
    check_json_path(settings["json"])
    bundle = Bundle.load(settings["bundle"])
    suspect, as_read = _suspect(settings, bundle.key)
    images = None
    if suspect is not None or settings["controls"]:
        images = suspect_images(settings, bundle.key, None)
    authority = settings["authority"]
    with options(api_names(settings)):
        judgement = judge(
            bundle,
            suspect=suspect.model if suspect else None,
            images=images.pixels if images else None,
            input_mean=as_read.input_mean,
            input_std=as_read.input_std,
            controls={path: open_control(path, bundle.key) for path in settings["controls"]},
            authority=read_bytes(Path(authority), "authority") if authority else None,
            suspect_since=_time(settings["suspect_since"]),
            grinding_bits=settings["grinding_bits"],
            alpha=settings["alpha"],
            max_queries=settings["api"]["max_queries"],
        )
    published = bundle.key.claim(bundle.statement.signer)
    print_rows(
        {**_rows(judgement, as_read, published), **(images.row() if images else {})},
        title="gradsigns judge",
        note=_note(judgement),
    )
    if settings["json"]:
        normalization = {"input_mean": list(as_read.input_mean), "input_std": list(as_read.input_std)}
        sources = {
            "bundle": settings["bundle"],
            "published_commitment": published,
            **(images.to_dict() if images else {}),
        }
        write_json(settings["json"], {**judgement.to_dict(), **normalization, **sources})
    return Outcome(judgement.verdict)


def _suspect(settings: dict[str, Any], key: WatermarkKey) -> tuple[Suspect | None, KeyAsRead]:
    """Return the suspect, and the key with the suspect's normalization.

    The judge's statement of the normalization takes precedence over the checkpoint's.
    """
    stated = [settings["input_mean"], settings["input_std"]]
    if (stated[0] is None) != (stated[1] is None):
        raise ValueError("`input_mean` and `input_std` must be given together or not at all.")
    if settings["normalized"] and stated[0] is None:
        raise ValueError(
            "`input_mean` and `input_std` must say how raw images become the `normalized` ones that the "
            "suspect takes."
        )
    as_read = KeyAsRead.of(key, input_mean=stated[0] or 0.0, input_std=stated[1] or 1.0)
    if all(settings[kind] is None for kind in ("checkpoint", "onnx", "endpoint")):
        return None, as_read
    suspect = open_suspect(settings, as_read)
    if stated[0] is None and suspect.input_mean is not None and suspect.input_std is not None:
        as_read = KeyAsRead.of(key, input_mean=suspect.input_mean, input_std=suspect.input_std)
    return suspect, as_read


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(
            f"`suspect_since` must be a time such as 2026-11-23T00:00:00+00:00, got {text!r}."
        ) from error
    return time


def _rows(judgement: Judgement, as_read: KeyAsRead, published: str) -> dict[str, str]:
    dated = {None: "", True: ", before the suspect", False: ", not known to be before the suspect"}[
        judgement.precedes_suspect
    ]
    rows = {
        "verdict": judgement.verdict.replace("_", " "),
        "owner": judgement.owner,
        "signer": judgement.signer,
        "published commitment": f"{published} (must be in the file that the claimant published)",
        "key's commitment": judgement.commitment,
        "committed at": (judgement.committed_at.isoformat() if judgement.committed_at else "not known")
        + dated,
    }
    if judgement.reading is not None:
        rows["suspect's inputs"] = f"(raw - {_numbers(as_read.input_mean)}) / {_numbers(as_read.input_std)}"
    for name, result in (("own reading", judgement.reading), ("claimant's reading", judgement.transcript)):
        if result is not None:
            rows[name] = f"{matches(result)}, p = {format_p_value(result)}"
    rows |= {
        f"control {name}": f"{matches(result)}, p = {format_p_value(result)}"
        for name, result in judgement.controls.items()
    }
    rows["raw p-value"] = power(judgement.log10_p_value)
    trials = f"2^{judgement.grinding_bits:g} keys tried"
    if judgement.payload_bits:
        trials += f", payload of {judgement.payload_bits:g} bits"
    rows["adjusted p-value"] = (
        f"{power(judgement.log10_adjusted_p_value)} for {trials} (owned at <= {judgement.alpha:g})"
    )
    return rows


def _numbers(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"({', '.join(f'{value:g}' for value in values)})"


def _note(judgement: Judgement) -> str:
    notes = (
        []
        if judgement.verdict == "owned"
        else [as_sentence(f"{judgement.verdict.replace('_', ' ')}: {judgement.reason}")]
    )
    notes += [f"Note: {remark}." for remark in judgement.remarks]
    if judgement.precedes_suspect is None:
        notes.append("To have the date checked, give authority=... suspect_since=...")
    if judgement.verdict == "owned":
        notes.append(
            "If somebody else proves a claim to the same suspect, the earlier valid time-stamp takes "
            "precedence. Ask both for a model of their own from before the suspect and judge it with both "
            "bundles: the claimant whose mark alone it carries was first."
        )
    return "\n".join(notes)
