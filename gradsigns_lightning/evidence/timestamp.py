"""Time-stamps (RFC 3161), by which an authority states when it saw a commitment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.dsa import DSAPublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from gradsigns_lightning.core.utils.optional import require
from gradsigns_lightning.evidence.commitment import Statement

# usual replies have 3 to 8 KiB; all root certificates of a browser together have 250 KiB
_MAX_REPLY_BYTES, _MAX_AUTHORITY_BYTES = 1 << 18, 1 << 20
_STRONG_DIGESTS = {
    f"2.16.840.1.101.3.4.2.{i}": name for i, name in enumerate(("SHA-256", "SHA-384", "SHA-512"), 1)
}
_BROKEN_HASHES = (hashes.MD5, hashes.SHA1)
_LEAST_KEY_BITS, _LEAST_CURVE_BITS = 2048, 224
_NOT_THE_FILES = (KeyboardInterrupt, SystemExit, MemoryError)
_CLOCK_SKEW = timedelta(minutes=5)
_CONTEXT_0 = 0xA0  # DER's tag of a constructed element with context-specific number 0


def timestamp_request(statement: Statement) -> bytes:
    """Return a time-stamp request (RFC 3161, section 2.4.1) for the statement's SHA-256, in DER."""
    client = require("rfc3161_client", extra="evidence")
    builder = (
        client.TimestampRequestBuilder()
        .data(statement.to_bytes())
        .hash_algorithm(client.HashAlgorithm.SHA256)
    )
    request: bytes = builder.nonce(nonce=True).cert_request(cert_request=True).build().as_bytes()
    return request


def check_timestamp(reply: bytes, statement: Statement, authority: bytes) -> datetime:
    """Check an authority's reply (RFC 3161, section 2.4.2) and return when it saw the statement, in UTC.

    Certificates must have been valid at the time of the stamp; they may have expired since. SHA-1 proves
    nothing: neither the stamp nor a certificate between it and the trusted root may be signed with it, nor
    with an RSA key shorter than 2048 bits. The identifier of the certificate inside the stamp (ESSCertID of
    RFC 2634, a SHA-1 digest by its standard) is allowed, because it is not a signature: it only refers to a
    certificate, which is checked by its own chain.

    Args:
        reply: the reply, DER.
        statement: what was stamped.
        authority: certificates that are trusted, PEM, among them the root's.

    Raises:
        ValueError: ``reply`` is not a time-stamp reply, refuses the request, is for something else, lies in
            the future, rests on SHA-1 or a short key, or is not from a trusted authority.
        ImportError: rfc3161-client is not installed.
    """
    client = require("rfc3161_client", extra="evidence")
    trusted = _certificates(authority)
    try:
        if len(reply) > _MAX_REPLY_BYTES:
            raise ValueError(f"it has more than {_MAX_REPLY_BYTES} bytes")
        response = client.decode_timestamp_response(_in_order(reply))
        roots = [certificate for certificate in trusted if _is_root(certificate)]
        others = [certificate for certificate in trusted if not _is_root(certificate)]
        client.VerifierBuilder(roots=roots, intermediates=others).build().verify_message(
            response, statement.to_bytes()
        )
        time: datetime = response.tst_info.gen_time
        _check_time(time)
        _check_strength(response.signed_data, trusted, time)
    # the library's errors share no other base class, and its panics are not even an Exception
    except BaseException as error:
        if isinstance(error, _NOT_THE_FILES):
            raise
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(
            f"`timestamp` must be a trusted authority's reply for this commitment: {reason.rstrip('.')}."
        ) from error
    return time


def _in_order(reply: bytes) -> bytes:
    """Return the reply with its certificates in the order that DER requires of sets.

    rfc3161-client requires that order, while openssl and some authorities write certificates in any order. No
    signature covers it.
    """
    try:
        (outer,) = _elements(reply, 0, len(reply))
        token = _elements(reply, *outer[2:])[1]
        (signed_data,) = _elements(reply, *_elements(reply, *token[2:])[1][2:])
        start, end = next(
            content for tag, _, *content in _elements(reply, *signed_data[2:]) if tag == _CONTEXT_0
        )
        certificates = sorted(reply[first:last] for _, first, _, last in _elements(reply, start, end))
    except (ValueError, IndexError, StopIteration):
        return reply  # rfc3161-client says what is wrong
    return reply[:start] + b"".join(certificates) + reply[end:]


def _elements(data: bytes, start: int, end: int) -> list[tuple[int, int, int, int]]:
    """Return tag, start, start of the content and end of each DER element between ``start`` and ``end``."""
    found = []
    while start < end:
        content, length = start + 2, data[start + 1]
        if length & 0x80:
            content, length = (
                content + (length & 0x7F),
                int.from_bytes(data[content : content + (length & 0x7F)], "big"),
            )
        found.append((data[start], start, content, content + length))
        start = content + length
    if start != end:
        raise ValueError("elements must fill the element that holds them")
    return found


def _check_time(time: datetime) -> None:
    if time > datetime.now(timezone.utc) + _CLOCK_SKEW:
        raise ValueError(f"its time, {time.isoformat()}, lies in the future")


def _check_strength(signed_data: Any, trusted: Sequence[x509.Certificate], time: datetime) -> None:
    """Check that the stamp's signature and a chain to a trusted root do without SHA-1 and short keys."""
    # OpenSSL verifies with the signer's digest algorithm, and requires it to be among these.
    weak = {oid.dotted_string for oid in signed_data.digest_algorithms} - set(_STRONG_DIGESTS)
    if weak:
        names = ", ".join(_STRONG_DIGESTS.values())
        raise ValueError(
            f"it must be signed with {names}, not with the digest algorithm {min(weak)} (SHA-1 is "
            "1.3.14.3.2.26)"
        )
    embedded = [x509.load_der_x509_certificate(data) for data in signed_data.certificates]
    (info,) = signed_data.signer_infos
    signers = [c for c in embedded if (c.issuer, c.serial_number) == (info.issuer, info.serial_number)]
    if len(signers) != 1:
        raise ValueError(
            f"it must hold its signer's certificate once, got {len(signers)} with that name and number"
        )
    _check_chain(signers[0], [*embedded, *trusted], trusted, time)


def _check_chain(
    signer: x509.Certificate,
    pool: Sequence[x509.Certificate],
    trusted: Sequence[x509.Certificate],
    time: datetime,
) -> None:
    """Find a chain from the signer to a trusted root over valid, strong certificates only."""
    # rfc3161-client accepts weak ones.
    reached, weaknesses = [signer], []
    for certificate in reached:  # the list grows on the way
        is_trusted = _is_root(certificate) and certificate in trusted
        weakness = _weakness(certificate, time, is_trusted=is_trusted)
        if weakness is not None:
            weaknesses.append(f"certificate {certificate.subject.rfc4514_string()[:80]!r} {weakness}")
        elif is_trusted:
            return
        else:
            reached += [issuer for issuer in _issuers(certificate, pool) if issuer not in reached]
    raise ValueError("; ".join(weaknesses) or "no chain of certificates leads to a trusted root")


def _issuers(certificate: x509.Certificate, pool: Sequence[x509.Certificate]) -> Iterator[x509.Certificate]:
    for issuer in dict.fromkeys(pool):
        if issuer.subject == certificate.issuer and (_is_root(issuer) or _is_authority(issuer)):
            try:
                certificate.verify_directly_issued_by(issuer)
            except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
                continue
            yield issuer


def _is_root(certificate: x509.Certificate) -> bool:
    return certificate.issuer == certificate.subject


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _weakness(certificate: x509.Certificate, time: datetime, *, is_trusted: bool) -> str | None:
    """Return why a certificate is not accepted, or None."""
    if not certificate.not_valid_before_utc <= time <= certificate.not_valid_after_utc:
        return "was not valid at the time of the stamp"
    # a trusted root's signature of itself proves nothing, so it need not be strong
    if not is_trusted and isinstance(certificate.signature_hash_algorithm, _BROKEN_HASHES):
        return f"is signed with {certificate.signature_hash_algorithm.name.upper()}"
    key = certificate.public_key()
    least = _LEAST_KEY_BITS if isinstance(key, (RSAPublicKey, DSAPublicKey)) else _LEAST_CURVE_BITS
    size = getattr(key, "key_size", least)  # an Edwards curve has one size, which is strong
    return f"has a key of {size} bits, fewer than {least}" if size < least else None


def _certificates(pem: bytes) -> list[x509.Certificate]:
    if len(pem) > _MAX_AUTHORITY_BYTES:
        raise ValueError(f"`authority` must have at most {_MAX_AUTHORITY_BYTES} bytes, got {len(pem)}.")
    try:
        certificates = list(dict.fromkeys(x509.load_pem_x509_certificates(pem)))
        has_root = any(_is_root(certificate) for certificate in certificates)
    # the library also raises other errors than ValueError, and its panics are not even an Exception
    except BaseException as error:
        if isinstance(error, _NOT_THE_FILES):
            raise
        raise ValueError(
            "`authority` must be a PEM file with the time-stamp authority's certificates."
        ) from error
    if not has_root:
        raise ValueError("`authority` must hold the authority's root certificate, which signs itself.")
    return certificates
