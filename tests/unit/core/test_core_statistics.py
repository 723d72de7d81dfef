"""The exact tests agree with scipy, fractions and the published table of thresholds."""

import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from gradsigns_lightning.core.statistics import (
    log10_ownership_p_value,
    log10_sign_flip_p_value,
    ownership_p_value,
    sign_flip_p_value,
)

THRESHOLDS = {  # matches needed at p <= 1e-3, 1e-6, 1e-9, 1e-12
    32: (26, 30, 32, None),
    64: (45, 51, 56, 59),
    128: (82, 92, 98, 103),
    256: (154, 167, 176, 184),
}


def exact(n_matches: int, n_bits: int) -> Fraction:
    return Fraction(sum(math.comb(n_bits, k) for k in range(n_matches, n_bits + 1)), 2**n_bits)


@given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_p_value_is_the_exact_fraction_rounded_once(counts):
    assert ownership_p_value(*counts) == float(exact(*counts))


@pytest.mark.parametrize("n_bits", [8, 64, 128, 1000])
def test_scipy_agrees(n_bits):
    for n_matches in range(0, n_bits + 1, max(1, n_bits // 16)):
        assert ownership_p_value(n_matches, n_bits) == pytest.approx(
            binom.sf(n_matches - 1, n_bits, 0.5), rel=1e-9
        )


@pytest.mark.parametrize("n_bits", THRESHOLDS)
def test_published_thresholds(n_bits):
    for alpha, needed in zip((1e-3, 1e-6, 1e-9, 1e-12), THRESHOLDS[n_bits], strict=True):
        enough = [k for k in range(n_bits + 1) if ownership_p_value(k, n_bits) <= alpha]
        assert min(enough, default=None) == needed


@pytest.mark.parametrize(("n_bits", "p"), [(32, 2.3e-10), (64, 5.4e-20), (128, 2.9e-39), (256, 8.6e-78)])
def test_a_perfect_match(n_bits, p):
    assert ownership_p_value(n_bits, n_bits) == 2.0**-n_bits == pytest.approx(p, rel=0.02)


@pytest.mark.parametrize("n_bits", [1, 64, 128, 1000, 8192])
def test_the_logarithm_agrees_and_does_not_underflow(n_bits):
    upper_half = (2**n_bits + (math.comb(n_bits, n_bits // 2) if n_bits % 2 == 0 else 0)) // 2
    for n_matches, outcomes in ((0, 2**n_bits), (-(-n_bits // 2), upper_half), (n_bits, 1)):
        logarithm = log10_ownership_p_value(n_matches, n_bits)
        assert logarithm == pytest.approx(math.log10(outcomes) - n_bits * math.log10(2), abs=1e-9)
        assert logarithm <= 0
    assert log10_ownership_p_value(n_bits, n_bits) == pytest.approx(-n_bits * math.log10(2))


def test_the_p_value_of_the_longest_key_underflows_to_zero():
    assert ownership_p_value(8192, 8192) == 0.0
    assert ownership_p_value(4096, 8192) == pytest.approx(0.5, abs=0.01)


def test_no_decided_bit_proves_nothing():
    assert ownership_p_value(0, 0) == 1.0
    assert log10_ownership_p_value(0, 0) == 0.0


@pytest.mark.parametrize("function", [ownership_p_value, log10_ownership_p_value])
@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ((9, 8), ValueError, r"`n_matches` must be an integer in \[0, 8\], got 9"),
        ((-1, 8), ValueError, "`n_matches`"),
        ((0, -1), ValueError, "`n_bits` must be an integer >= 0"),
        ((1.0, 8), TypeError, "`n_matches` must be an integer"),
        ((1, True), TypeError, "`n_bits` must be an integer"),
    ],
)
def test_impossible_counts_are_refused(function, counts, error, message):
    with pytest.raises(error, match=message):
        function(*counts)


# --- weighted bits


@pytest.mark.parametrize("seed", range(20))
def test_the_sign_flip_test_counts_all_signs(seed):
    generator = random.Random(seed)
    scores = [generator.randint(-6, 6) for _ in range(generator.randint(1, 10))]
    weights = [abs(score) for score in scores if score]
    sums = [
        sum(s * w for s, w in zip(signs, weights, strict=True))
        for signs in itertools.product((1, -1), repeat=len(weights))
    ]
    assert sign_flip_p_value(scores) == sum(total >= sum(scores) for total in sums) / len(sums)


@pytest.mark.parametrize("weight", [1, 7])
@pytest.mark.parametrize(("n_matches", "n_bits"), [(0, 5), (3, 5), (60, 64), (128, 128)])
def test_equal_weights_are_the_binomial_test(weight, n_matches, n_bits):
    scores = [weight] * n_matches + [-weight] * (n_bits - n_matches) + [0, 0]
    assert sign_flip_p_value(scores) == ownership_p_value(n_matches, n_bits)
    assert log10_sign_flip_p_value(scores) == log10_ownership_p_value(n_matches, n_bits)


def test_the_sign_flip_test_does_not_underflow():
    scores = [3] * 600 + [2] * 600
    assert sign_flip_p_value(scores) == 0.0
    assert log10_sign_flip_p_value(scores) == pytest.approx(-1200 * math.log10(2))


def test_no_evidence_proves_nothing():
    assert sign_flip_p_value([]) == sign_flip_p_value([0, 0]) == 1.0


def test_scores_must_be_whole():
    with pytest.raises(TypeError, match="`scores` must be an integer"):
        sign_flip_p_value([0.5])
