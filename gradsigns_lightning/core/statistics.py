"""The exact tests behind every p-value: an unmarked model's matches follow Binomial(N, 1/2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from gradsigns_lightning.core.utils.checks import check_int


@lru_cache(maxsize=1024)
def _tail(n_matches: int, n_bits: int) -> int:
    # Number of the 2**n_bits outcomes with at least n_matches matches, in exact integers.
    tail, coefficient = 0, 1
    for k in range(n_bits, n_matches - 1, -1):
        tail += coefficient
        coefficient = coefficient * k // (n_bits - k + 1)
    return tail


def ownership_p_value(n_matches: int, n_bits: int) -> float:
    """Return the exact probability that an unmarked model matches at least that many bits.

    If the signature is fixed before the suspect is seen, and uniform given everything else, ``p = P[Bin(N,
    1/2) >= matches]``. It is computed in integers and rounded once; below about 1e-308 it underflows to 0
    (see :func:`log10_ownership_p_value`).

    Args:
        n_matches: matching bits, 0 to ``n_bits``.
        n_bits: decided bits (without erasures), at least 0.

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


def sign_flip_p_value(scores: Sequence[int]) -> float:
    """Return the exact probability that random signs give a sum at least as large as that of ``scores``.

    This is the randomisation test for weighted bits (Fisher, The Design of Experiments, 1935, section 21). A
    score is a bit's weight, positive where the responses agree with the signature. The weights may depend on
    all responses but not on the signature; then, for a model not signed with the key, every sign is a fair
    coin and ``p = P[sum of +-|score_j| >= sum of score_j]``. With weights of one it equals
    :func:`ownership_p_value`.

    Args:
        scores: integers; a zero is an erasure. Time grows with their number times the sum of their sizes.

    Example:
        >>> sign_flip_p_value([3, 2, 1])  # only + + + reaches 6
        0.125
        >>> sign_flip_p_value([3, 2, -1]) == 2 / 8
        True
    """
    tail, n_bits = _sign_flip_tail(scores)
    return tail / (1 << n_bits)


def log10_sign_flip_p_value(scores: Sequence[int]) -> float:
    """Return the base-10 logarithm of :func:`sign_flip_p_value`, finite for every number of scores."""
    tail, n_bits = _sign_flip_tail(scores)
    return math.log10(tail) - n_bits * math.log10(2)


def _sign_flip_tail(scores: Sequence[int]) -> tuple[int, int]:
    weights = [abs(check_int("scores", score)) for score in scores if score]
    divisor = math.gcd(*weights)
    if divisor == 0 or all(weight == divisor for weight in weights):
        return _tail(sum(score > 0 for score in scores), len(weights)), len(weights)
    # The number of sign patterns for each sum of the positive weights is the coefficient of a polynomial. The
    # coefficients are packed into one integer, so that each weight costs a shift and an addition.
    width = len(weights) + 1
    counts = 1
    for weight in weights:
        counts += counts << (width * (weight // divisor))
    total = sum(weights) // divisor
    least = -(-(total + sum(scores) // divisor) // 2)
    # The sum of the digits of a number in base B is its remainder modulo B - 1, if the sum is less than that.
    tail = (counts >> (width * least)) % ((1 << width) - 1)
    return tail, len(weights)


def _check(n_matches: int, n_bits: int) -> None:
    check_int("n_bits", n_bits, minimum=0)
    check_int("n_matches", n_matches, minimum=0, maximum=n_bits)
