"""Derivation of every part of a key from one secret.

The streams must be byte-identical on every platform and with every library version, because evidence is read
years after it was made. So nothing here uses a framework's random generator: HKDF-SHA256 (RFC 5869) separates
the streams by a labelled, versioned info string, SHAKE-256 (FIPS 202) expands each of them, and integers are
little-endian.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SECRET_BYTES = 32
COPYS_SECRET_BYTES = 2 * SECRET_BYTES  # one half is shared by all copies, the other is the copy's own
CUSTOMER_BYTES = 2
Purpose = Literal["owner", "customer", "message"]


class Secret:
    """A key's secret, which only :meth:`reveal` shows: not ``repr``, ``vars``, ``asdict`` or ``pickle``.

    Args:
        value: 32 bytes, or 64 for a copy's key.

    Raises:
        ValueError: the value is anything else.
    """

    __slots__ = ("_reveal",)

    def __init__(self, value: bytes) -> None:
        if not isinstance(value, bytes) or len(value) not in (SECRET_BYTES, COPYS_SECRET_BYTES):
            got = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
            raise ValueError(
                f"`secret` must be {SECRET_BYTES} bytes, or {COPYS_SECRET_BYTES} for a copy's key, got {got}."
            )
        self._reveal: Callable[[], bytes] = lambda: value

    @classmethod
    def of(cls, value: bytes | Secret) -> Secret:
        """Return ``value`` as a secret."""
        return value if isinstance(value, Secret) else cls(value)

    def reveal(self) -> bytes:
        """Return the bytes."""
        return self._reveal()

    def __repr__(self) -> str:
        return "Secret(...)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self.reveal() == other.reveal()

    def __hash__(self) -> int:
        return hash(self.reveal())

    def __deepcopy__(self, memo: Any) -> Secret:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("A key's secret cannot be pickled.")


def check_hidden(secret: Secret, payload: bytes, *, purpose: Purpose, n_bits: int) -> None:
    """Refuse a secret or a payload whose length does not fit the key's purpose and bits."""
    if len(payload) * 8 > n_bits:
        raise ValueError(
            f"`payload` must have at most n_bits // 8 = {n_bits // 8} bytes, got {len(payload)} bytes."
        )
    if purpose == "customer" and len(payload) != CUSTOMER_BYTES:
        raise ValueError(
            f"`payload` of a customer's key must have {CUSTOMER_BYTES} bytes, got {len(payload)}."
        )
    n_bytes, needed = len(secret.reveal()), SECRET_BYTES if purpose == "owner" else COPYS_SECRET_BYTES
    if n_bytes != needed:
        raise ValueError(
            f"`secret` of a key of purpose {purpose!r} must be {needed} bytes, got {n_bytes} bytes."
        )


class Streams:
    """The streams under one secret.

    Args:
        secret: an owner's secret, or one half of a copy's.
        context: canonical bytes of everything that the streams are bound to.
        version: version of the derivation.
    """

    def __init__(self, secret: Secret, context: bytes, version: int) -> None:
        self._secret, self._context, self._version = secret, context, version

    def __repr__(self) -> str:
        return f"Streams(context={self._context!r}, version={self._version})"

    def under(self, secret: Secret) -> Streams:
        """Return the streams under another secret, with the same context and version."""
        return Streams(secret, self._context, self._version)

    def bytes(self, label: str, n_bytes: int) -> bytes:
        """Return the first ``n_bytes`` of the stream named ``label``, for example ``"carriers"``."""
        salt = f"gradsigns-lightning/key/v{self._version}".encode()
        info = f"gradsigns/v{self._version}/{label}\n".encode() + self._context
        stream_key = HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(self._secret.reveal())
        return hashlib.shake_256(stream_key).digest(n_bytes)

    def bits(self, label: str, n_bits: int) -> npt.NDArray[np.uint8]:
        """Return ``n_bits`` values 0 or 1, least significant bit of each byte first; shape ``(n_bits,)``."""
        stream = np.frombuffer(self.bytes(label, -(-n_bits // 8)), dtype=np.uint8)
        return np.unpackbits(stream, bitorder="little")[:n_bits]

    def subset(self, label: str, size: int, n_chosen: int) -> npt.NDArray[np.int64]:
        """Return ``n_chosen`` distinct values of ``range(size)``, uniform over all subsets, ascending.

        Every value draws a 64-bit word; the values with the smallest words are chosen (ties, of probability
        below ``size**2 / 2**65``, go to the smaller value).
        """
        words = np.frombuffer(self.bytes(label, 8 * size), dtype="<u8")
        order = np.argsort(words, kind="stable")
        return np.sort(order[:n_chosen]).astype(np.int64)


@dataclass(frozen=True)
class Derivation:
    """Derives the parts of one key (docs/key-format.md).

    Attributes:
        space: streams of what all copies share: carriers and projection.
        mark: streams of everything else: the owner's, or those of one copy alone.
        purpose: purpose of the key.
        version: version of the derivation.
    """

    space: Streams
    mark: Streams
    purpose: Purpose
    version: int

    @classmethod
    def of(cls, secret: Secret, *, purpose: Purpose, context: bytes, version: int) -> Derivation:
        """Return the derivation of a key's parts from its secret."""
        mark = Streams(Secret(secret.reveal()[-SECRET_BYTES:]), context, version)
        if version == 1:
            return cls(mark, mark, purpose, version)
        is_owners = purpose == "owner"
        space = mark.under(
            Secret(mark.bytes("space", SECRET_BYTES) if is_owners else secret.reveal()[:SECRET_BYTES])
        )
        return cls(space, mark, purpose, version)

    def carriers(self, size: int, n_carriers: int) -> npt.NDArray[np.int64]:
        """Return indices into an input of ``size`` coordinates, ascending; shape ``(c,)``."""
        return self.space.subset("carriers", size, n_carriers)

    def projection(self, n_bits: int, n_carriers: int) -> npt.NDArray[np.int8]:
        """Return values +1 and -1; shape ``(N, c)``."""
        signs = self.space.bits("projection", n_bits * n_carriers).view(np.int8)
        signs += signs  # in place, because a verifier may derive thousands of keys
        signs -= 1
        return signs.reshape(n_bits, n_carriers)

    def signature(self, n_bits: int, payload: bytes) -> npt.NDArray[np.uint8]:
        """Return the signature, shape ``(N,)``, values 0 and 1.

        It is the keystream XOR the payload; a customer's is the keystream alone.
        """
        if self.purpose == "customer":
            return self.mark.bits(self._label("customer", int.from_bytes(payload, "little")), n_bits)
        bits = self.mark.bits(self._label(self.purpose), n_bits)
        written = np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little")
        bits[: len(written)] ^= written
        return bits

    def customer_signatures(self, n_customers: int, n_bits: int) -> npt.NDArray[np.uint8]:
        """Return the signatures of a master's customers; shape ``(n_customers, N)``, values 0 and 1."""
        marks = self.mark.bytes("mark/customers", SECRET_BYTES * n_customers)
        streams = [
            self.mark.under(Secret(marks[i : i + SECRET_BYTES])) for i in range(0, len(marks), SECRET_BYTES)
        ]
        n_bytes = -(-n_bits // 8)
        packed = b"".join(
            stream.bytes(self._label("customer", i), n_bytes) for i, stream in enumerate(streams)
        )
        rows = np.frombuffer(packed, np.uint8).reshape(n_customers, n_bytes)
        return np.unpackbits(rows, axis=1, count=n_bits, bitorder="little")

    def copys_secret(self, purpose: Purpose, payload: bytes) -> Secret:
        """Return the secret of a copy's key; a customer's payload is the customer's number."""
        number = int.from_bytes(payload[:CUSTOMER_BYTES], "little") if purpose == "customer" else 0
        end = SECRET_BYTES * (number + 1)
        return Secret(
            self.mark.bytes("space", SECRET_BYTES) + self.mark.bytes(f"mark/{purpose}s", end)[-SECRET_BYTES:]
        )

    def digest(self, name: str, content: bytes) -> str:
        """Return SHA-256 of ``content``, salted by a stream of the secret, in hexadecimal."""
        salt = self.mark.bytes(f"{name}-salt", 32)
        return hashlib.sha256(f"gradsigns/v{self.version}/{name}\n".encode() + salt + content).hexdigest()

    def _label(self, purpose: Purpose, number: int | None = None) -> str:
        """Return the label of a signature's stream.

        The label of a copy's stream contains a tag of the carriers' secret, and the customer's number. If a
        copy's two secrets were independent, 2^a of one and 2^b of the other would make 2^(a + b) tries at the
        price of 2^a + 2^b, and one customer's key could pass for another's.
        """
        if purpose == "owner":
            return "signature"
        return "/".join(["signature", purpose, *([] if number is None else [str(number)]), self._space_tag])

    @cached_property
    def _space_tag(self) -> str:
        return self.space.bytes("tag", 32).hex()
