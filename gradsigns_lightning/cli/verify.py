"""``gradsigns verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from gradsigns_lightning.cli.commit import CommitmentFiles
from gradsigns_lightning.cli.runner import Outcome
from gradsigns_lightning.cli.tables import (
    as_sentence,
    check_json_path,
    format_p_value,
    print_rows,
    verification_rows,
    write_json,
)
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.evidence import Bundle
from gradsigns_lightning.runs.build import to_plain
from gradsigns_lightning.runs.options import load_key
from gradsigns_lightning.runs.settings import reading_settings
from gradsigns_lightning.runs.suspect import check_normalization, open_suspect, read, suspect_images
from gradsigns_lightning.verification.api.queries import read_journal
from gradsigns_lightning.verification.images import pixels_of


def run(config: Any) -> Outcome:
    """Read a key from a suspect and report.

    Returns:
        The verdict and the bit error rate, which is NaN if no bit could be read.

    Raises:
        ValueError: suspect, key and images do not fit together, or there is nothing to make a bundle from.
    """
    settings = to_plain(config)
    check_json_path(settings["json"])
    key_file = settings["key"]["path"]
    key = load_key(key_file)
    files = _check_bundle(settings, key)
    suspect = open_suspect(settings, key)
    check_normalization(suspect, key)
    images = suspect_images(settings, key, suspect.data_name)
    result = read(suspect, key, images.pixels, settings)
    rows = {
        **verification_rows(result, n_key_bits=key.n_bits),
        "key file": key_file,
        suspect.kind: suspect.source,
        **images.row(),
        "key's commitment": result.commitment,
    }
    if files is not None:
        _write_bundle(settings, files, key, images.pixels)
        rows["evidence bundle"] = settings["bundle"]
    reason = "" if result.verdict == "owned" else as_sentence(f"{rows['verdict']}: {result.reason}")
    print_rows(rows, title="gradsigns verify", note="\n".join(filter(None, [reason, _note(settings, files)])))
    if settings["json"]:
        sources = {
            suspect.kind: suspect.source,
            "key": key_file,
            "images": settings["images"],
            "data": suspect.data_name,
        }
        told = {"reason": result.reason, "log10_charged_p_value": result.log10_charged_p_value}
        write_json(
            settings["json"],
            {**result.to_dict(), **told, **sources, **images.to_dict(), "bundle": settings["bundle"]},
        )
    cell = {name: rows[name] for name in ("verdict", "matching bits")} | {"p-value": format_p_value(result)}
    return Outcome(result.verdict, result.bit_error_rate, cell)


def _note(settings: dict[str, Any], files: CommitmentFiles | None) -> str:
    if files is None or settings["checkpoint"] is not None:
        return ""
    announced = files.read_statement().reading
    if announced == reading_settings(settings):
        return ""
    return f"The commitment announced another reading, so a judge will disregard the transcript: {announced}."


def _check_bundle(settings: dict[str, Any], key: WatermarkKey) -> CommitmentFiles | None:
    """Return the files that a bundle is made from, checked now lest a wrong path cost hours of queries."""
    if settings["bundle"] is None:
        return None
    target = Path(settings["bundle"]).expanduser()
    if target.exists() or not target.parent.is_dir():
        raise ValueError(f"`bundle` must name a new file in an existing folder, got {str(target)!r}.")
    if settings["commitment"] is None:
        raise ValueError("`commitment` must name the file that `gradsigns commit` wrote, to make a `bundle`.")
    if settings["checkpoint"] is None and settings["api"]["journal"] is None:
        raise ValueError("`api.journal` must name a file for the answers, to make a `bundle` of them.")
    files = CommitmentFiles(Path(settings["commitment"]))
    statement = files.read_statement()
    Bundle(key=key, statement=statement)
    files.read_signer()
    return files


def _write_bundle(
    settings: dict[str, Any], files: CommitmentFiles, key: WatermarkKey, images: Tensor
) -> None:
    journal = settings["api"]["journal"] if settings["checkpoint"] is None else None
    Bundle(
        key=key,
        statement=files.read_statement(),
        timestamp=files.read_timestamp(),
        images=pixels_of(images) if journal is not None else None,
        transcript=read_journal(journal) if journal is not None else None,
    ).save(settings["bundle"], files.read_signer())
