"""When the scores are looked at, and what a look may claim."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from gradsigns_lightning.core.statistics import sign_flip_p_value
from gradsigns_lightning.verification.api.sequential import (
    Looks,
    SequentialTest,
    integer_scores,
    is_futile,
    look_weight,
)


def test_the_weights_spend_no_more_than_alpha():
    assert sum(look_weight(k) for k in range(1, 10_000)) == pytest.approx(1, abs=1e-3)
    assert sum(look_weight(k) for k in range(1, 10_000)) < 1


def test_looks_are_geometric_and_end_with_the_budget():
    looks = Looks(128, 1000, 1e-9)
    assert looks.times[-1] == 1000
    assert 40 <= looks.times[0] <= 52
    assert all(1.2 < b / a < 1.4 for a, b in itertools.pairwise(looks.times))


@pytest.mark.parametrize("max_probes", [30, 100, 1000, 10_000])
@pytest.mark.parametrize("n_bits", [8, 29, 30, 31, 32, 33, 34, 36, 38, 40, 64, 128])
def test_all_bits_together_prove_at_every_look_and_looks_spend_no_more_than_alpha(n_bits, max_probes):
    looks = Looks(n_bits, max_probes, 1e-9)
    n_looks = len(looks.times) or looks.n_equal
    weights = [looks.weight(k) for k in range(1, 200)]
    assert sum(weights) <= 1 + 1e-12
    if n_bits >= 30:
        assert all(2.0**-n_bits <= 1e-9 * weight for weight in weights[:n_looks])


@pytest.mark.parametrize(("n_bits", "n_looks"), [(24, 1), (30, 1), (31, 2), (32, 4), (33, 8)])
def test_a_short_key_has_as_many_looks_as_its_bits_allow(n_bits, n_looks):
    looks = Looks(n_bits, 1000, 1e-9)
    assert (looks.times, looks.n_equal) == ((), n_looks)


def readings(signs, sizes):
    return [np.array(signs) * size for size in sizes]


def test_a_short_key_is_looked_at_when_its_bits_have_settled():
    looks, bits = Looks(32, 1000, 1e-9), np.where(np.arange(32) % 3, 1.0, -1.0)
    other = bits * np.where(np.arange(32) == 5, -1, 1)
    half = bits * (np.arange(32) < 16)
    shown = [half, bits, 1.4 * bits, 1.6 * bits, 3 * bits, other, 1.6 * other, 5 * bits, 9 * bits, 20 * other]
    due = [looks.due(100, 0, scores) for scores in shown]
    # Half of the bits prove nothing, and signs that were looked at before say nothing new.
    assert due == [False, False, False, True, False, False, True, False, False, False]


def test_the_last_of_several_looks_is_kept_for_the_end():
    looks, bits = Looks(31, 1000, 1e-9), np.ones(31)
    assert not looks.due(100, 0, bits)
    assert looks.due(100, 0, 2 * bits)
    assert not looks.due(100, 1, -bits)
    assert not looks.due(100, 1, -9 * bits)


def test_settled_bits_that_disagree_end_the_reading():
    looks = Looks(32, 1000, 1e-9)
    signed = np.ones(32)
    signed[:6] = -1
    assert not looks.is_over(signed)
    signed[:12] = -1
    assert looks.is_over(signed)


@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_waiting_for_settled_bits_claims_no_more_than_alpha(drift):
    """Bits also settle in noise, and at once with a drift, on which the signature has no influence."""
    generator = np.random.default_rng(8)
    n_bits, n_readings, alpha = 8, 5000, 4.5 * 2.0**-8
    n_looks = n_false = n_naive = 0
    for _ in range(n_readings):
        slopes, signature = drift * generator.standard_normal(n_bits), generator.choice([-1.0, 1.0], n_bits)
        scores, smallest = np.zeros(n_bits), 1.0
        looks = Looks(n_bits, 1000, alpha)
        test = SequentialTest(weight=looks.weight)
        for batch in range(12):
            scores = scores + slopes + generator.standard_normal(n_bits)
            if looks.due(32 * batch, test.n_looks, scores) or batch == 11:
                signed = integer_scores(signature * scores)
                smallest = min(smallest, sign_flip_p_value(signed))
                test.look(signed)
        n_looks += test.n_looks
        n_false += test.log10_p_value <= math.log10(alpha)
        n_naive += smallest <= alpha
    assert looks.n_equal == 4
    assert n_looks > 1.2 * n_readings
    assert stats.binomtest(n_false, n_readings, alpha, alternative="greater").pvalue > 1e-3
    assert n_naive > 1.1 * n_false  # what an uncorrected p-value would claim


def test_a_look_claims_its_share_only():
    test = SequentialTest(n_hypotheses=3)
    test.look([1] * 20)
    assert test.log10_p_value == pytest.approx(math.log10(2.0**-20 * 2 * 3))
    test.look([1] * 10)
    assert test.log10_p_value == pytest.approx(math.log10(2.0**-20 * 2 * 3))
    test.look([1] * 40)
    assert test.log10_p_value == pytest.approx(math.log10(2.0**-40 * 12 * 3))


def test_peeking_at_fair_coins_claims_no_more_than_alpha():
    generator = np.random.default_rng(0)
    alpha, n_readings, n_false, n_naive = 0.05, 2000, 0, 0
    for _ in range(n_readings):
        signed = np.zeros(40)
        test, smallest = SequentialTest(), 1.0
        for _ in range(8):
            signed += generator.standard_normal(40)
            scores = integer_scores(signed)
            smallest = min(smallest, sign_flip_p_value(scores))
            test.look(scores)
        n_false += test.log10_p_value <= math.log10(alpha)
        n_naive += smallest <= alpha
    assert n_false <= alpha * n_readings
    assert n_naive > 1.5 * alpha * n_readings  # what an uncorrected p-value would claim


@pytest.mark.parametrize("n_bits", [8, 128, 5000])
def test_scores_keep_signs_and_order(n_bits):
    scores = np.random.default_rng(1).standard_normal(n_bits)
    scores[:2] = 0, np.nan
    integers = np.array(integer_scores(scores))
    assert integers[:2].tolist() == [0, 0]
    assert (np.sign(integers[2:]) == np.sign(scores[2:])).all()
    order = np.argsort(np.abs(scores[2:]))
    assert (np.diff(np.abs(integers[2:])[order]) >= 0).all()
    assert np.abs(integers).max() <= 31


def test_one_outlier_does_not_outweigh_the_rest():
    scores = integer_scores(np.array([1e6] + [1.0] * 63))
    assert max(scores) <= 31
    assert integer_scores(np.zeros(4)) == [0, 0, 0, 0]


def test_hopeless_readings_end_and_others_go_on():
    generator = np.random.default_rng(2)
    noise = generator.standard_normal(64)
    assert is_futile(noise - noise.mean(), n_probes=500, max_probes=600, alpha=1e-9)
    assert not is_futile(noise - noise.mean(), n_probes=50, max_probes=100_000, alpha=1e-9)
    assert not is_futile(np.abs(noise), n_probes=500, max_probes=600, alpha=1e-9)
    assert not is_futile(np.full(64, np.nan), n_probes=500, max_probes=600, alpha=1e-9)
    assert is_futile(-np.ones(64), n_probes=64, max_probes=600, alpha=1e-9)


@pytest.mark.parametrize("n_bits", [34, 36, 40])
def test_a_short_key_of_which_some_bits_are_still_wrong_goes_on(n_bits):
    """Hoeffding's bound says for so few bits that not even all of them would suffice."""
    signed = np.ones(n_bits)
    signed[: n_bits // 3] = -1
    assert not is_futile(signed, n_probes=150, max_probes=10_000, alpha=1e-9)
    signed[: n_bits // 2] = -1
    assert is_futile(signed, n_probes=900, max_probes=1000, alpha=1e-9)
