"""The exact test behind every claim: matches of an unmarked model follow Binomial(N, 1/2)."""

from __future__ import annotations

import math
from functools import lru_cache

from gradsigns_lightning.core.checks import check_int


@lru_cache(maxsize=64)
def _tails(n_bits: int) -> tuple[int, ...]:
    # tails[k] = number of the 2**n_bits outcomes with at least k matches, in exact integers.
    tails = [0] * (n_bits + 2)
    coefficient = 1
    for k in range(n_bits, -1, -1):
        tails[k] = tails[k + 1] + coefficient
        coefficient = coefficient * k // (n_bits - k + 1)
    return tuple(tails)


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
    return _tails(n_bits)[n_matches] / (1 << n_bits)


def log10_ownership_p_value(n_matches: int, n_bits: int) -> float:
    """Return the base-10 logarithm of :func:`ownership_p_value`, finite for every key size."""
    _check(n_matches, n_bits)
    return math.log10(_tails(n_bits)[n_matches]) - n_bits * math.log10(2)


def _check(n_matches: int, n_bits: int) -> None:
    check_int("n_bits", n_bits, minimum=0)
    check_int("n_matches", n_matches, minimum=0, maximum=n_bits)
