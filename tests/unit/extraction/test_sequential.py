"""When the evidence is looked at, and what a look may claim."""

import itertools
import math

import numpy as np
import pytest

from gradsigns_lightning.core.statistics import sign_flip_p_value
from gradsigns_lightning.extraction.sequential import Evidence, integer_scores, is_futile, look_schedule, look_weight


def test_the_weights_spend_no_more_than_alpha():
    assert sum(look_weight(k) for k in range(1, 10_000)) == pytest.approx(1, abs=1e-3)
    assert sum(look_weight(k) for k in range(1, 10_000)) < 1


def test_looks_are_geometric_and_end_with_the_budget():
    schedule = look_schedule(128, 1000, 1e-9)
    assert schedule[-1] == 1000
    assert 40 <= schedule[0] <= 52
    assert all(1.2 < b / a < 1.4 for a, b in itertools.pairwise(schedule))


@pytest.mark.parametrize(("n_bits", "n_looks"), [(29, 1), (31, 1), (32, 1), (34, 3), (36, 7), (64, 13)])
def test_a_short_key_can_be_proven_at_every_look(n_bits, n_looks):
    schedule = look_schedule(n_bits, 1000, 1e-9)
    assert len(schedule) == n_looks
    if n_bits > 31:
        assert 2.0**-n_bits / look_weight(n_looks) <= 1e-9


def test_a_look_claims_its_share_only():
    evidence = Evidence(n_hypotheses=3)
    evidence.look([1] * 20)
    assert evidence.log10_p_value == pytest.approx(math.log10(2.0**-20 * 2 * 3))
    evidence.look([1] * 10)
    assert evidence.log10_p_value == pytest.approx(math.log10(2.0**-20 * 2 * 3))
    evidence.look([1] * 40)
    assert evidence.log10_p_value == pytest.approx(math.log10(2.0**-40 * 12 * 3))


def test_peeking_at_fair_coins_claims_no_more_than_alpha():
    generator = np.random.default_rng(0)
    alpha, n_readings, false_claims, naive = 0.05, 2000, 0, 0
    for _ in range(n_readings):
        coins = np.zeros(40)
        evidence, smallest = Evidence(), 1.0
        for _ in range(8):
            coins += generator.standard_normal(40)
            scores = integer_scores(coins)
            smallest = min(smallest, sign_flip_p_value(scores))
            evidence.look(scores)
        false_claims += evidence.log10_p_value <= math.log10(alpha)
        naive += smallest <= alpha
    assert false_claims <= alpha * n_readings
    assert naive > 1.5 * alpha * n_readings  # what an uncorrected p-value would claim


@pytest.mark.parametrize("n_bits", [8, 128, 5000])
def test_scores_keep_signs_and_order(n_bits):
    evidence = np.random.default_rng(1).standard_normal(n_bits)
    evidence[:2] = 0, np.nan
    scores = np.array(integer_scores(evidence))
    assert scores[:2].tolist() == [0, 0]
    assert (np.sign(scores[2:]) == np.sign(evidence[2:])).all()
    order = np.argsort(np.abs(evidence[2:]))
    assert (np.diff(np.abs(scores[2:])[order]) >= 0).all()
    assert np.abs(scores).max() <= 31


def test_one_wild_answer_does_not_outweigh_the_rest():
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
