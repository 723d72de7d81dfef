"""The public commitment: fixed before the model is released, dated by a time-stamp authority."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key

from gradsigns_lightning.core.canonical import canonical_json, parse_json
from gradsigns_lightning.core.checks import check_instance
from gradsigns_lightning.extraction.settings import ReadingSettings

_FORMATS = ("gradsigns-commitment/1", "gradsigns-commitment/2")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_COMMITMENTS = 100_000
_MAX_FILE_BYTES = 1 << 23


@dataclass(frozen=True)
class Statement:
    """What the owner publishes before releasing a model; it reveals nothing about the keys.

    Attributes:
        commitments: public commitment of each key, 64 hexadecimal digits. Several keys can be committed to at once and opened one
            at a time.
        signer: Ed25519 public key of who may claim them, 64 hexadecimal digits. Opening a key reveals its secret; nobody who
            reads the evidence can claim the model with it, because they cannot sign for this.
        reading: how the owner will read a prediction API, so that no settings can be chosen to fit the answers; None in
            statements of format 1, of which no transcript counts as read as announced.

    Raises:
        ValueError: a value is no digest, or there are too many.
    """

    commitments: tuple[str, ...]
    signer: str
    reading: ReadingSettings | None = None

    def __post_init__(self) -> None:
        if not self.commitments or len(self.commitments) > _MAX_COMMITMENTS:
            raise ValueError(f"`commitments` must be 1 to {_MAX_COMMITMENTS} digests, got {len(self.commitments)}.")
        for value in (*self.commitments, self.signer):
            if not isinstance(value, str) or not _DIGEST.fullmatch(value):
                raise ValueError(f"`commitments` and `signer` must be 64 hexadecimal digits each, got {str(value)[:80]!r}.")

    def to_bytes(self) -> bytes:
        """Return the content of the published file: one line of canonical JSON. These bytes are what is time-stamped."""
        content: dict[str, Any] = {"format": _FORMATS[0], "commitments": list(self.commitments), "signer": self.signer}
        if self.reading is not None:
            content |= {"format": _FORMATS[1], "reading": self.reading.to_dict()}
        return canonical_json(content) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Statement:
        """Read a published file.

        Raises:
            ValueError: it is something else, or not canonical.
        """
        try:
            content = parse_json(data, max_bytes=_MAX_FILE_BYTES, max_values=_MAX_COMMITMENTS + 1000)
            reading = None if content["format"] == _FORMATS[0] else ReadingSettings.from_dict(content["reading"])
            statement = cls(tuple(content["commitments"]), content["signer"], reading)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError("`commitment` must be one of gradsigns-lightning; this is damaged or something else.") from error
        if statement.to_bytes() != data:
            raise ValueError("`commitment` must be exactly as it was written; this one was edited.")
        return statement


def make_statement(commitments: Sequence[str], signer: Ed25519PrivateKey, *, reading: ReadingSettings | None = None) -> Statement:
    """Return the statement that commits ``signer`` to keys and to how they will be read; by default as ``verify_api`` does."""
    check_instance("signer", signer, Ed25519PrivateKey)
    return Statement(tuple(commitments), public_hex(signer.public_key()), ReadingSettings() if reading is None else reading)


def load_signer(pem: bytes) -> Ed25519PrivateKey:
    """Read a signing key, PEM (PKCS 8) without password.

    Raises:
        ValueError: it is something else.
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
