"""Derivation of every part of a key from one secret.

The streams must be byte-identical on every platform and for every library version, because evidence is read years after it
was made. So nothing here uses a framework's random generator: HKDF-SHA256 (RFC 5869) separates the streams by a labelled,
versioned info string, SHAKE-256 (FIPS 202) expands each of them, and integers are read in little-endian order.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SECRET_BYTES = 32
_SALT = b"gradsigns-lightning/key/v1"


def expand(secret: bytes, label: str, context: bytes, n_bytes: int) -> bytes:
    """Return ``n_bytes`` of the stream that ``label`` and ``context`` name under ``secret``.

    Args:
        secret: the owner's secret, 32 bytes.
        label: the stream's name, for example ``"carriers"``.
        context: canonical bytes of all that the stream is bound to.
        n_bytes: the stream's length.
    """
    info = f"gradsigns/v1/{label}\n".encode() + context
    stream_key = HKDF(algorithm=SHA256(), length=32, salt=_SALT, info=info).derive(secret)
    return hashlib.shake_256(stream_key).digest(n_bytes)


def expand_bits(secret: bytes, label: str, context: bytes, n_bits: int) -> npt.NDArray[np.uint8]:
    """Return ``n_bits`` values 0 or 1, least significant bit of each byte first; shape ``(n_bits,)``."""
    stream = np.frombuffer(expand(secret, label, context, -(-n_bits // 8)), dtype=np.uint8)
    return np.unpackbits(stream, bitorder="little")[:n_bits]


def expand_subset(secret: bytes, label: str, context: bytes, size: int, n_chosen: int) -> npt.NDArray[np.int64]:
    """Return ``n_chosen`` distinct values of ``range(size)``, uniform over all subsets, ascending.

    Every value draws a 64-bit word; the values with the smallest words are chosen (ties, of probability below
    ``size**2 / 2**65``, go to the smaller value).
    """
    words = np.frombuffer(expand(secret, label, context, 8 * size), dtype="<u8")
    order = np.argsort(words, kind="stable")
    return np.sort(order[:n_chosen]).astype(np.int64)
