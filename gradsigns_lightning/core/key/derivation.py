"""Derivation of every part of a key from one secret.

The streams must be byte-identical on every platform and for every library version, because evidence is read years after it
was made. So nothing here uses a framework's random generator: HKDF-SHA256 (RFC 5869) separates the streams by a labelled,
versioned info string, SHAKE-256 (FIPS 202) expands each of them, and integers are read in little-endian order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SECRET_BYTES = 32
COPYS_SECRET_BYTES = 2 * SECRET_BYTES  # what copies share, and what one of them has alone


class Secret:
    """A key's secret, which shows itself on request only: no ``repr``, ``vars``, ``asdict`` or ``pickle`` tells it.

    Args:
        value: 32 bytes, or 64 of a copy's key.

    Raises:
        ValueError: it is something else.
    """

    __slots__ = ("_reveal",)

    def __init__(self, value: bytes) -> None:
        if not isinstance(value, bytes) or len(value) not in (SECRET_BYTES, COPYS_SECRET_BYTES):
            got = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
            raise ValueError(f"`secret` must be {SECRET_BYTES} bytes, or {COPYS_SECRET_BYTES} of a copy's key, got {got}.")
        self._reveal: Callable[[], bytes] = lambda: value

    @classmethod
    def of(cls, value: bytes | Secret) -> Secret:
        """Return a secret as it is, or one of bytes."""
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


class Streams:
    """The streams under one secret.

    Args:
        secret: an owner's secret, or one half of a copy's.
        context: canonical bytes of all that the streams are bound to.
        version: of the derivation.
    """

    def __init__(self, secret: Secret, context: bytes, version: int) -> None:
        self._secret, self._context, self._version = secret, context, version

    def __repr__(self) -> str:
        return f"Streams(context={self._context!r}, version={self._version})"

    def bytes(self, label: str, n_bytes: int) -> bytes:
        """Return ``n_bytes`` of the stream that ``label`` names, for example ``"carriers"``."""
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

        Every value draws a 64-bit word; the values with the smallest words are chosen (ties, of probability below
        ``size**2 / 2**65``, go to the smaller value).
        """
        words = np.frombuffer(self.bytes(label, 8 * size), dtype="<u8")
        order = np.argsort(words, kind="stable")
        return np.sort(order[:n_chosen]).astype(np.int64)
