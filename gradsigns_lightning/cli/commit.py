"""``gradsigns commit``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gradsigns_lightning.cli.runner import Outcome
from gradsigns_lightning.cli.tables import check_json_path, print_rows, write_json
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.key.payload import free_bits
from gradsigns_lightning.core.key.reach import what_is_out_of_reach
from gradsigns_lightning.core.utils.files import atomic_write, read_file
from gradsigns_lightning.evidence import (
    Statement,
    check_timestamp,
    load_signer,
    make_statement,
    signer_pem,
    timestamp_request,
)
from gradsigns_lightning.runs.build import to_plain
from gradsigns_lightning.runs.options import load_key
from gradsigns_lightning.runs.settings import reading_settings
from gradsigns_lightning.verification.api.settings import ApiSettings

_SUFFIX = ".commitment.json"
_NO_REQUEST = (
    "for the request to a time-stamp authority install 'gradsigns-lightning[evidence]' and commit again with "
    "another `out`, or make it with openssl ts -query"
)
_WHICH = (
    "The published commitment, of the key and the signer, is in that file: compare it with the one that "
    "`judge` prints. The key's commitment is that of the key alone, as keygen, train, verify and judge print "
    "it."
)
_MAX_FILE_BYTES = 1 << 24  # a commitment to 100,000 keys has 7 MB


@dataclass(frozen=True)
class CommitmentFiles:
    """The files of a published commitment.

    Attributes:
        statement: ``NAME.commitment.json``, to be published.
    """

    statement: Path

    @property
    def request(self) -> Path:
        """``NAME.commitment.tsq``, to be sent to a time-stamp authority."""
        return self.statement.with_suffix(".tsq")

    @property
    def reply(self) -> Path:
        """``NAME.commitment.tsr``, the authority's reply."""
        return self.statement.with_suffix(".tsr")

    @property
    def signer(self) -> Path:
        """``NAME.commitment.pem``, to be kept secret."""
        return self.statement.with_suffix(".pem")

    def read_statement(self) -> Statement:
        """Return the commitment."""
        return Statement.from_bytes(read_bytes(self.statement, "commitment"))

    def read_signer(self) -> Ed25519PrivateKey:
        """Return the signing key."""
        return load_signer(read_bytes(self.signer, "signer"))

    def read_timestamp(self) -> bytes | None:
        """Return the authority's reply, or None if there is none."""
        return read_bytes(self.reply, "timestamp") if self.reply.exists() else None


def run(config: Any) -> Outcome:
    """Write a commitment to one or several keys, or attach the time-stamp authority's reply to it.

    Returns:
        The outcome for a sweep's table.

    Raises:
        ValueError: a file is missing, damaged, or would be overwritten.
    """
    settings = to_plain(config)
    check_json_path(settings["json"])
    paths = settings["key"]["path"]
    paths = paths if isinstance(paths, list) else [paths]
    if not paths:
        raise ValueError("`key` must name a key file, or several as in key=[a.gskey,b.gskey], got [].")
    keys = [load_key(path) for path in paths]
    files = CommitmentFiles(Path(settings["out"] or Path(str(paths[0])).with_suffix(_SUFFIX)).expanduser())
    if settings["attach"] is None:
        statement, time = _commit(files, keys, settings["signer"], reading_settings(settings)), None
        send = f"send {files.request} to a time-stamp authority" if files.request.exists() else _NO_REQUEST
        note = f"Publish {files.statement}; {send}; keep {files.signer} secret."
        note = f"{note}\n{_WHICH}\n{_short_keys(keys)}".rstrip()
    else:
        statement, time = _attach(files, keys, settings)
        note = "The commitment is time-stamped. Publish both files. Anyone can check them:\n"
        note += _openssl(files, settings, time)
    rows = {
        "commitment file": str(files.statement),
        **_digests(keys, statement),
        "signer": statement.signer,
        "time-stamp": "not yet" if time is None else f"{time.isoformat()} in {files.reply}",
    }
    print_rows(rows, title="gradsigns commit", note=note)
    if settings["json"]:
        content = {
            "commitment_file": str(files.statement),
            "commitments": list(statement.commitments),
            "key_commitments": [key.commitment for key in keys],
            "signer": statement.signer,
            "committed_at": time.isoformat() if time else None,
        }
        write_json(settings["json"], content)
    return Outcome(cell={name: rows[name] for name in ("commitment file", "time-stamp")})


def _digests(keys: list[WatermarkKey], statement: Statement) -> dict[str, str]:
    """Return the two digests of each key.

    The published one is bound to the signer, so that nobody can copy it into another file.
    """
    rows: dict[str, str] = {}
    for number, key in enumerate(keys, 1):
        which = f" {number}" if len(keys) > 1 else ""
        rows |= {
            f"published commitment{which}": key.claim(statement.signer),
            f"key's commitment{which}": key.commitment,
        }
    return rows


def _short_keys(keys: list[WatermarkKey]) -> str:
    """Return what no judge can find of keys that are too short; empty if they are long enough.

    None of them counts as a master: a commitment is not for tracing customers' copies.
    """
    return " ".join(
        dict.fromkeys(what_is_out_of_reach(k.n_bits, free_bits=free_bits(k), is_master=False) for k in keys)
    ).strip()


def _commit(
    files: CommitmentFiles, keys: list[WatermarkKey], signer_file: str | None, reading: ApiSettings
) -> Statement:
    for path in (files.statement, files.request, files.signer):
        if path.exists() and (path != files.signer or signer_file is None):
            raise ValueError(f"`out` must not name an existing commitment, but there is {str(path)!r}.")
    signer = (
        Ed25519PrivateKey.generate()
        if signer_file is None
        else load_signer(read_bytes(Path(signer_file), "signer"))
    )
    statement = make_statement(keys, signer, reading=reading)
    contents = {
        files.signer: signer_pem(signer),
        **_request(files, statement),
        files.statement: statement.to_bytes(),
    }
    if files.signer.exists() and signer_pem(files.read_signer()) != contents.pop(files.signer):
        raise ValueError(
            f"`signer` must be the one in {str(files.signer)!r}, which belongs to `out`; got another."
        )
    _write_all(contents, secret=files.signer)
    return statement


def _request(files: CommitmentFiles, statement: Statement) -> dict[Path, bytes]:
    """Return the request to a time-stamp authority; empty without rfc3161-client, which is optional."""
    try:
        return {files.request: timestamp_request(statement)}
    except ImportError:
        return {}


def _write_all(contents: dict[Path, bytes], *, secret: Path) -> None:
    """Write new files, all or none.

    Of two commands for the same commitment, one fails at its first file and removes nothing.
    """
    written: list[Path] = []
    try:
        for path, data in contents.items():
            atomic_write(path, data, argument="out", overwrite=False, mode=0o600 if path == secret else 0o644)
            written.append(path)
    except BaseException:
        for path in written:
            path.unlink()
        raise


def _attach(
    files: CommitmentFiles, keys: list[WatermarkKey], settings: dict[str, Any]
) -> tuple[Statement, datetime]:
    if settings["authority"] is None:
        raise ValueError(
            "`authority` must name a PEM file with the time-stamp authority's certificates, to check its "
            "reply."
        )
    statement = files.read_statement()
    if not all(map(statement.commits_to, keys)):
        raise ValueError(f"`key` must name keys that {str(files.statement)!r} commits to, got another.")
    reply = read_bytes(Path(settings["attach"]), "attach")
    time = check_timestamp(reply, statement, read_bytes(Path(settings["authority"]), "authority"))
    atomic_write(files.reply, reply, argument="out", overwrite=True, mode=0o644)
    return statement, time


def _openssl(files: CommitmentFiles, settings: dict[str, Any], time: datetime) -> str:
    """Return the openssl command that checks the stamp at its own time, since certificates expire."""
    names = {"-data": files.statement, "-in": files.reply, "-CAfile": settings["authority"]}
    words = [word for option, path in names.items() for word in (option, str(path))]
    return shlex.join(["openssl", "ts", "-verify", "-attime", str(int(time.timestamp())), *words])


def read_bytes(path: Path, argument: str) -> bytes:
    """Return a small file's content.

    Raises:
        ValueError: the file cannot be read, or is larger than any commitment, key or certificate.
    """
    return read_file(path, argument=argument, kind="file", max_bytes=_MAX_FILE_BYTES)
