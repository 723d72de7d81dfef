"""The exact test behind every claim: matches of an unmarked model follow Binomial(N, 1/2)."""

from __future__ import annotations

import math
from functools import lru_cache

from gradsigns_lightning.core.checks import check_int


@lru_cache(maxsize=1024)
def _tail(n_matches: int, n_bits: int) -> int:
    # Number of the 2**n_bits outcomes with at least n_matches matches, in exact integers.
    tail, coefficient = 0, 1
    for k in range(n_bits, n_matches - 1, -1):
        tail += coefficient
        coefficient = coefficient * k // (n_bits - k + 1)
    return tail


def ownership_p_value(n_matches: int, n_bits: int) -> float:
    """Return the exact probability that an unmarked model matches at least so many bits.

    If the signature is fixed before the suspect is seen and uniform given all else, ``p = P[Bin(N, 1/2) >= matches]``. It is
    computed in integers and rounded once; below about 1e-308 it underflows to 0 (see :func:`log10_ownership_p_value`).

    Args:
        n_matches: matching bits, 0 to ``n_bits``.
        n_bits: bits that were decided (erasures left out), 0 or more.

    Example:
        >>> f"{ownership_p_value(32, 32):.2e}"
        '2.33e-10'
    """
    _check(n_matches, n_bits)
    return _tail(n_matches, n_bits) / (1 << n_bits)


def log10_ownership_p_value(n_matches: int, n_bits: int) -> float:
    """Return the base-10 logarithm of :func:`ownership_p_value`, finite for every key size."""
    _check(n_matches, n_bits)
    return math.log10(_tail(n_matches, n_bits)) - n_bits * math.log10(2)


def _check(n_matches: int, n_bits: int) -> None:
    check_int("n_bits", n_bits, minimum=0)
    check_int("n_matches", n_matches, minimum=0, maximum=n_bits)
