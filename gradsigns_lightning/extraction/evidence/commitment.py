"""The public commitment: fixed before the model is released, dated by a time-stamp authority."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key

from gradsigns_lightning.core.canonical import canonical_json
from gradsigns_lightning.core.checks import check_instance

_FORMAT = "gradsigns-commitment/1"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_COMMITMENTS = 100_000


@dataclass(frozen=True)
class Statement:
    """What the owner publishes before releasing a model; it reveals nothing about the keys.

    Attributes:
        commitments: public commitment of each key, 64 hexadecimal digits. Several keys can be committed to at once and opened one
            at a time.
        signer: Ed25519 public key of who may claim them, 64 hexadecimal digits. Opening a key reveals its secret; nobody who
            reads the evidence can claim the model with it, because they cannot sign for this.
    """

    commitments: tuple[str, ...]
    signer: str

    def __post_init__(self) -> None:
        if not self.commitments or len(self.commitments) > _MAX_COMMITMENTS:
            raise ValueError(f"`commitments` must be 1 to {_MAX_COMMITMENTS} digests, got {len(self.commitments)}.")
        for value in (*self.commitments, self.signer):
            if not isinstance(value, str) or not _DIGEST.fullmatch(value):
                raise ValueError(f"`commitments` and `signer` must be 64 hexadecimal digits each, got {str(value)[:80]!r}.")

    def to_bytes(self) -> bytes:
        """Return the content of the published file: one line of canonical JSON. These bytes are what is time-stamped."""
        return canonical_json({"format": _FORMAT, "commitments": list(self.commitments), "signer": self.signer}) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Statement:
        """Read a published file.

        Raises:
            ValueError: it is something else, or not canonical.
        """
        try:
            content = json.loads(data)
            statement = cls(commitments=tuple(content["commitments"]), signer=content["signer"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError("`commitment` must be one of gradsigns-lightning; this is damaged or something else.") from error
        if statement.to_bytes() != data:
            raise ValueError("`commitment` must be exactly as it was written; this one was edited.")
        return statement


def make_statement(commitments: Sequence[str], signer: Ed25519PrivateKey) -> Statement:
    """Return the statement that commits ``signer`` to keys."""
    check_instance("signer", signer, Ed25519PrivateKey)
    return Statement(tuple(commitments), public_hex(signer.public_key()))


def timestamp_request(statement: Statement) -> bytes:
    """Return a time-stamp request (RFC 3161, section 2.4.1) over the statement's SHA-256, DER, to be sent to an authority."""
    client = _import_client()
    builder = client.TimestampRequestBuilder().data(statement.to_bytes()).hash_algorithm(client.HashAlgorithm.SHA256)
    request: bytes = builder.nonce(nonce=True).cert_request(cert_request=True).build().as_bytes()
    return request


def check_timestamp(reply: bytes, statement: Statement, authority: bytes) -> datetime:
    """Check an authority's reply (RFC 3161, section 2.4.2) and return when it saw the statement, in UTC.

    Args:
        reply: the reply, DER.
        statement: what was stamped.
        authority: certificates that are trusted, PEM, the root's among them.

    Raises:
        ValueError: the reply is none, was refused, is over something else, or is not by a trusted authority.
        ImportError: rfc3161-client is not installed.
    """
    client = _import_client()
    builder = client.VerifierBuilder()
    for certificate in _certificates(authority):
        is_root = certificate.issuer == certificate.subject
        builder = builder.add_root_certificate(certificate) if is_root else builder.add_intermediate_certificate(certificate)
    try:
        response = client.decode_timestamp_response(reply)
        builder.build().verify_message(response, statement.to_bytes())
        time: datetime = response.tst_info.gen_time
    except Exception as error:  # the library's errors share no other base class
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"`timestamp` must be a trusted authority's reply for this commitment: {reason.rstrip('.')}.") from error
    return time


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


def _certificates(pem: bytes) -> list[x509.Certificate]:
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ValueError("`authority` must be a PEM file with the time-stamp authority's certificates.") from error
    if not any(certificate.issuer == certificate.subject for certificate in certificates):
        raise ValueError("`authority` must hold the authority's root certificate, which signs itself.")
    return certificates


def _import_client() -> Any:
    try:
        import rfc3161_client
    except ImportError as error:
        raise ImportError("Time-stamps need rfc3161-client: pip install 'gradsigns-lightning[evidence]'.") from error
    return rfc3161_client
