"""The keys of copies: customers' numbers, and messages that survive bit errors.

A message is encoded with a shortened binary BCH code over the bits of the signature. Of the narrow-sense
primitive BCH codes (Bose and Ray-Chaudhuri, Information and Control 3, 1960) that fit, the one that corrects
the most errors is used; the library galois encodes and decodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from gradsigns_lightning.core.key.derivation import CUSTOMER_BYTES
from gradsigns_lightning.core.key.key import WatermarkKey
from gradsigns_lightning.core.key.opening import key_of
from gradsigns_lightning.core.key.reach import USUAL_ALPHA, USUAL_CUSTOMERS, what_is_out_of_reach
from gradsigns_lightning.core.key.signature_key import SignatureKey
from gradsigns_lightning.core.utils.checks import check_instance, check_int
from gradsigns_lightning.core.utils.optional import require
from gradsigns_lightning.lazy import in_pythons_folder

MAX_CUSTOMERS = 1 << 8 * CUSTOMER_BYTES
_QUICK_TRIES_BITS = 16  # a core tries 2^10.6 copies' secrets in the time of one owner's (docs/evidence.md)
BITS_PER_MESSAGE_BYTE = 32  # a quarter of the bits for the message, three quarters to correct errors
_SMALLEST_FIELD, _LARGEST_FIELD = 4, 13  # code lengths 15 to 8191


@dataclass(frozen=True)
class PayloadCode:
    """The code for ``n_bytes`` bytes of data in a signature of ``n_bits`` bits.

    Attributes:
        n_bits: bits of the key, 8 to 8192.
        n_bytes: bytes of data, at least 1.

    Raises:
        ValueError: so much data leaves no room to correct even one error.

    Example:
        >>> code = PayloadCode(n_bits=128, n_bytes=2)
        >>> code.n_correctable, code.length
        (23, 121)
    """

    n_bits: int
    n_bytes: int

    def __post_init__(self) -> None:
        check_int("n_bits", self.n_bits, minimum=8)
        check_int("n_bytes", self.n_bytes, minimum=1)
        if self._parameters is None:
            raise ValueError(
                f"`n_bytes`: {self.n_bytes} bytes leave no room for error correction in {self.n_bits} bits."
            )

    @property
    def n_correctable(self) -> int:
        """Number of bit errors that decoding always corrects."""
        return self._chosen[1]

    @property
    def length(self) -> int:
        """Number of bits of a codeword; the rest of the signature is not used."""
        return 8 * self.n_bytes + _n_check_bits(*self._chosen)

    def encode(self, data: bytes) -> bytes:
        """Return the payload for ``data``, as :meth:`WatermarkKey.with_payload` takes it.

        Raises:
            ValueError: the data does not have ``n_bytes`` bytes.
        """
        check_instance("data", data, bytes)
        if len(data) != self.n_bytes:
            raise ValueError(f"`data` must have {self.n_bytes} bytes, got {len(data)}.")
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        with _numba_kept_apart():
            codeword = np.asarray(self._library_code.encode(bits), np.uint8)
        return np.packbits(codeword, bitorder="little").tobytes()

    def decode(self, bits: npt.NDArray[np.uint8]) -> tuple[bytes, int]:
        """Return the data in unmasked bits ``(n_bits,)``, values 0 and 1, and the number of corrected errors.

        Raises:
            ValueError: there are more errors than the code corrects.
        """
        word = np.asarray(bits[: self.length], np.uint8)
        with _numba_kept_apart():
            message, n_errors = self._library_code.decode(word, errors=True)
        if n_errors < 0:
            raise ValueError(f"`bits` hold no codeword within {self.n_correctable} errors.")
        return np.packbits(np.asarray(message, np.uint8), bitorder="little").tobytes(), int(n_errors)

    @property
    def _chosen(self) -> tuple[int, int]:
        assert self._parameters is not None
        return self._parameters

    @property
    def _parameters(self) -> tuple[int, int] | None:
        return _best_parameters(8 * (self.n_bits // 8), 8 * self.n_bytes)

    @property
    def _library_code(self) -> Any:
        return _bch(*self._chosen)


def customer_key(master: WatermarkKey | str | PathLike[str], customer: int) -> WatermarkKey:
    """Return the key of one customer's copy.

    It has the master's carriers and projection, and a signature and a secret of its own. The signatures are a
    pseudorandom function of the number: any copies, mixed in any way, tell nothing of another customer's. Nor
    do other customers' keys: one that is opened in a dispute shows where all copies are signed, but neither
    the master's secret nor anybody else's signature.

    Args:
        master: a key without payload, or its file; at least 44 bits; 128 let :func:`trace` tolerate wrong
            bits.
        customer: the customer's number, 0 to 65535.

    Raises:
        ValueError: the number is out of range, or the master is of version 1, has a payload or has too few
            bits.
    """
    check_int("customer", customer, minimum=0, maximum=MAX_CUSTOMERS - 1)
    master = key_of(master, argument="master")
    check_master(master)
    check_traceable(master.n_bits, n_customers=max(USUAL_CUSTOMERS, customer + 1), alpha=USUAL_ALPHA)
    return customer_key_of(master, customer)


def customer_key_of(master: WatermarkKey, customer: int) -> WatermarkKey:
    """Return a customer's key without checking whether it can be traced."""
    return master.derive("customer", customer.to_bytes(CUSTOMER_BYTES, "little"))


def check_traceable(n_bits: int, *, n_customers: int, alpha: float) -> None:
    """Refuse keys with which not even a perfect reading can identify one of ``n_customers`` at ``alpha``.

    Raises:
        ValueError: the key is too short; the message says which length suffices.
    """
    needed = math.floor(math.log2(n_customers) - math.log2(alpha)) + 1
    if n_bits < needed:
        raise ValueError(
            f"`master` must have at least {needed} bits to tell {n_customers} customers apart at alpha = "
            f"{alpha:g} (128 leave room for wrong bits), got {n_bits}."
        )


def message_key(master: WatermarkKey | str | PathLike[str], message: str) -> WatermarkKey:
    """Return the key of a copy with a short text, which :func:`read_message` reads despite bit errors.

    It does not contain the master's secret, but the mask of all messages of this master: whoever opens it can
    write any message.

    Args:
        master: a key without payload, or its file; at least 64 bits.
        message: at most ``n_bits // 32`` bytes of UTF-8, without zero bytes. For 128 bits these are four
            bytes, with which up to 15 wrong bits of the signature are corrected.

    Raises:
        ValueError: the message is too long, or the master is of version 1, has a payload or has too few bits.
    """
    check_instance("message", message, str)
    master = key_of(master, argument="master")
    code = message_code(master)
    data = _encoded(message)
    if len(data) > code.n_bytes or b"\0" in data:
        raise ValueError(
            f"`message` must be at most {code.n_bytes} bytes of UTF-8 without zeros, got {len(data)} bytes."
        )
    return blank_message_key(master, code.encode(data.ljust(code.n_bytes, b"\0")))


def blank_message_key(master: WatermarkKey, payload: bytes = b"") -> WatermarkKey:
    """Return the messages' key with this payload; without one its signature is the mask of all messages."""
    return master.derive("message", payload)


def message_code(master: WatermarkKey) -> PayloadCode:
    """Return the code of messages; the errors are those of :func:`message_key`."""
    check_master(master)
    return PayloadCode(master.n_bits, _message_bytes(master.n_bits))


def _encoded(message: str) -> bytes:
    try:
        return message.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`message` must be text that UTF-8 can hold, got {message!r}.") from error


def check_master(master: WatermarkKey) -> None:
    """Refuse a key from which no copies' keys can be derived.

    Raises:
        ValueError: the key is of version 1, has a payload, or is a copy's itself.
    """
    if master.version < 2:
        raise ValueError(
            f"`master` must be a key of version 2 or later, got version {master.version}; make a new one."
        )
    if master.has_payload:
        raise ValueError("`master` must be a key without payload, got one with a payload of its own.")


def free_bits(key: SignatureKey) -> float:
    """Return how many bits of choice a key's payload and purpose leave to its maker.

    A free payload can be chosen so that the signature fits any model, which costs the proof a factor of two
    per bit. A message's payload is charged as if it were free, though it should be a codeword. A customer's
    number gives no choice. All copies' keys are charged one bit for their purpose, and 16 because their
    signatures can be tried with the same carriers and projection, at the price of a few hashes.

    Returns:
        The number of bits; NaN for a key that is not of this package, whose signature may come from anywhere.
    """
    if not isinstance(key, WatermarkKey):
        return math.nan
    n_bits = 8.0 * len(bytes.fromhex(key.reveal()["payload"]))
    if key.purpose == "owner":
        return n_bits
    return _QUICK_TRIES_BITS + 1 + (n_bits if key.purpose == "message" else 0)


def out_of_reach(key: WatermarkKey) -> str:
    """Return what a new key has too few bits to ever prove, in a sentence for each purpose; may be empty."""
    is_master = key.version > 1 and not key.has_payload
    return what_is_out_of_reach(key.n_bits, free_bits=free_bits(key), is_master=is_master)


def _message_bytes(n_bits: int) -> int:
    return max(1, n_bits // BITS_PER_MESSAGE_BYTE)


@contextmanager
def _numba_kept_apart() -> Iterator[None]:
    # Numba, which compiles galois, sets the process's OpenMP threads to the number of cores. torchrun sets
    # one per rank, and two ranks that wait for each other's threads train many times slower. And whenever it
    # compiles, numba reads settings, which may name pickles, from the current folder, which in a command may
    # be a received one.
    import torch

    n_threads = torch.get_num_threads()
    try:
        with in_pythons_folder():
            yield
    finally:
        torch.set_num_threads(n_threads)


@lru_cache(maxsize=64)  # galois compiles for seconds
def _bch(field: int, n_correctable: int) -> Any:
    n = 2**field - 1
    return require("galois", extra="payload").BCH(n, n - _n_check_bits(field, n_correctable))


@lru_cache(maxsize=256)
def _best_parameters(length: int, n_data_bits: int) -> tuple[int, int] | None:
    """Return field degree m and error number t of the code that corrects most, or None if none fits."""
    best = None
    for field in range(_SMALLEST_FIELD, _LARGEST_FIELD + 1):
        room = min(length, 2**field - 1) - n_data_bits
        most = _most_correctable(field, room)
        if most and (best is None or most > best[1]):
            best = field, most
    return best


def _most_correctable(field: int, room: int) -> int:
    low, high = 0, max(0, room // 2)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _n_check_bits(field, middle) <= room else (low, middle - 1)
    return low


@lru_cache(maxsize=4096)
def _n_check_bits(field: int, n_correctable: int) -> int:
    """Return the degree of the generator polynomial.

    Its roots are the powers 1 to 2 t of the primitive element, and their conjugates.
    """
    n = 2**field - 1
    return len({power * 2**i % n for power in range(1, 2 * n_correctable, 2) for i in range(field)})
