import json
import math
from fractions import Fraction

import pytest
import torch

from gradsigns_lightning.benchmark import AttackRecord, Point, Reading
from gradsigns_lightning.benchmark.records import bits_reading, log10_binomial_tail

OWNED = Reading(128, 128, 0, -38.5, 11.0, "owned", 100)
GONE = Reading(128, 66, 0, -0.5, 0.3, "not_proven", 100)
BLANK = Reading(128, 0, 128, math.nan, math.nan, "inconclusive", 100)


def record(before=OWNED, after=GONE, *, lost=0.01, curve=()):
    return AttackRecord(
        "FineTuning",
        {"epochs": 5},
        "model",
        Point(0, 0.9, before),
        Point(5, 0.9 - lost, after),
        curve,
        1.5,
        300,
    )


@pytest.mark.parametrize(
    ("before", "after", "lost", "wins"),
    [
        (OWNED, GONE, 0.01, True),
        (OWNED, BLANK, -0.02, True),
        (OWNED, GONE, 0.06, False),
        (OWNED, OWNED, 0.0, False),
        (GONE, GONE, 0.0, False),
    ],
)
def test_a_thief_wins_who_removes_a_proven_mark_for_less_than_five_points(before, after, lost, wins):
    assert record(before, after, lost=lost).wins is wins


def test_a_record_comes_back_from_json_as_it_was():
    whole = record(after=BLANK, curve=(Point(1, 0.89, OWNED), Point(2, 0.88, BLANK)))
    text = json.dumps(whole.to_dict(), allow_nan=False)
    again = AttackRecord.from_dict(json.loads(text))
    assert again.to_dict() == whole.to_dict()
    assert math.isnan(again.after.reading.w)
    assert again.curve[0] == whole.curve[0]
    assert (json.loads(text)["wins"], json.loads(text)["accuracy_lost"]) == (True, pytest.approx(0.01))


@pytest.mark.parametrize(
    ("n_matches", "n", "chance"), [(0, 10, 0.1), (7, 10, 0.1), (100, 100, 0.1), (33, 64, 0.5)]
)
def test_the_tail_of_a_binomial_is_summed_as_it_stands(n_matches, n, chance):
    p = Fraction(chance)
    exact = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n_matches, n + 1))
    assert log10_binomial_tail(n_matches, n, chance) == pytest.approx(math.log10(exact), abs=1e-9)


def test_bits_that_are_exactly_zero_are_erasures():
    reading = bits_reading(torch.tensor([1.0, -2.0, 0.0, 3.0]), n_queries=7, alpha=0.6, w=1.0)
    assert (reading.n_bits, reading.n_matches, reading.n_erasures, reading.n_queries) == (4, 2, 1, 7)
    assert 10**reading.log10_p_value == pytest.approx(0.5)
    assert reading.verdict == "owned"
    assert bits_reading(torch.zeros(4), n_queries=0, alpha=0.5, w=math.nan).verdict == "inconclusive"
