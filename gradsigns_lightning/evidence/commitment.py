"""The public commitment: fixed before the model is released, dated by a time-stamp authority."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from gradsigns_lightning.core.key import WatermarkKey, key_of
from gradsigns_lightning.core.utils.canonical import canonical_json, parse_json
from gradsigns_lightning.core.utils.checks import check_instance
from gradsigns_lightning.verification.api.settings import ApiSettings

_FORMAT = "gradsigns-commitment/2"
_FORMER = "gradsigns-commitment/1"
_NOT_A_STATEMENT = "`commitment` must be a file of `gradsigns commit`; this is damaged or something else."
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_COMMITMENTS = 100_000
_MAX_FILE_BYTES = 1 << 23


@dataclass(frozen=True)
class Statement:
    """What the owner publishes before releasing a model; it reveals nothing about the keys.

    Attributes:
        commitments: :meth:`WatermarkKey.claim` of each key and this signer, 64 hexadecimal digits each.
            Several keys can be committed to at once and opened one at a time. A commitment is bound to the
            signer, so nobody can copy it into a statement of their own.
        signer: Ed25519 public key of the owner, 64 hexadecimal digits. Opening a key reveals its secret, but
            whoever reads the evidence cannot claim the model with it, because they cannot sign.
        reading: how the owner will read a prediction API, so that settings cannot be chosen to fit the
            answers.

    Raises:
        ValueError: a value is not a digest, or there are too many.
    """

    commitments: tuple[str, ...]
    signer: str
    reading: ApiSettings = field(default_factory=ApiSettings)

    def __post_init__(self) -> None:
        if not self.commitments or len(self.commitments) > _MAX_COMMITMENTS:
            raise ValueError(
                f"`commitments` must be 1 to {_MAX_COMMITMENTS} digests, got {len(self.commitments)}."
            )
        for value in (*self.commitments, self.signer):
            if not isinstance(value, str) or not _DIGEST.fullmatch(value):
                raise ValueError(
                    f"`commitments` and `signer` must be 64 hexadecimal digits each, got {str(value)[:80]!r}."
                )

    def to_bytes(self) -> bytes:
        """Return the content of the published file, one line of canonical JSON, which is time-stamped."""
        content = {"format": _FORMAT, "commitments": list(self.commitments), "signer": self.signer}
        return canonical_json({**content, "reading": self.reading.to_dict()}) + b"\n"

    def commits_to(self, key: WatermarkKey) -> bool:
        """Tell whether the signer of this statement had ``key`` when it was made."""
        return key.claim(self.signer) in self.commitments

    @classmethod
    def from_bytes(cls, data: bytes) -> Statement:
        """Read a published file.

        Raises:
            ValueError: ``data`` is something else, or not canonical.
        """
        try:
            content = parse_json(data, max_bytes=_MAX_FILE_BYTES, max_values=_MAX_COMMITMENTS + 1000)
        except ValueError as error:
            raise ValueError(_NOT_A_STATEMENT) from error
        _check_format(content)
        try:
            reading = ApiSettings.from_dict(content["reading"])
            statement = cls(tuple(content["commitments"]), content["signer"], reading)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(_NOT_A_STATEMENT) from error
        if statement.to_bytes() != data:
            raise ValueError("`commitment` must be exactly as it was written; this one was edited.")
        return statement


def _check_format(content: Any) -> None:
    """Refuse the former format with what to do: its owner must publish a new file, however old the stamp."""
    if isinstance(content, dict) and content.get("format") == _FORMER:
        raise ValueError(
            f"`commitment` has format {_FORMER!r}, which anybody could copy into a file of their own and "
            f"have stamped; this release reads {_FORMAT!r}. Commit to the same keys again with `gradsigns "
            "commit`, and have that file time-stamped."
        )


def make_statement(
    keys: Sequence[WatermarkKey | str | PathLike[str]],
    signer: Ed25519PrivateKey,
    *,
    reading: ApiSettings | None = None,
) -> Statement:
    """Return the statement that commits ``signer`` to keys and to how they will be read.

    Args:
        keys: the keys, or their files.
        signer: signing key of the owner, who alone can claim the keys.
        reading: how a prediction API will be read; by default with the defaults of :func:`verify_api`.

    Raises:
        TypeError: ``keys`` holds neither keys nor files (public commitments do not suffice), or ``signer`` is
            not a signing key.
        ValueError: there are no keys, or too many, or a file is missing or not a key file.
    """
    check_instance("signer", signer, Ed25519PrivateKey)
    opened = [key_of(key, argument="keys") for key in keys]
    public = public_hex(signer.public_key())
    return Statement(
        tuple(key.claim(public) for key in opened), public, ApiSettings() if reading is None else reading
    )


def load_signer(pem: bytes) -> Ed25519PrivateKey:
    """Read a signing key, PEM (PKCS 8) without password.

    Raises:
        ValueError: ``pem`` is something else.
    """
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise ValueError("`signer` must be an Ed25519 private key in a PEM file without password.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"`signer` must be an Ed25519 private key, got {type(key).__name__}.")
    return key


def signer_pem(signer: Ed25519PrivateKey) -> bytes:
    """Return a signing key as PEM (PKCS 8) without password."""
    return signer.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_hex(key: Ed25519PublicKey) -> str:
    """Return a public key as 64 hexadecimal digits."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def is_signed(message: bytes, signature: bytes, signer: str) -> bool:
    """Tell whether ``signature`` is ``signer``'s over ``message``."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
