"""Several alignments side by side: which is queried next, and what that may depend on."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from gradsigns_lightning.verification.api.hypotheses import Hypothesis, read_hypotheses
from gradsigns_lightning.verification.api.sequential import Looks, SequentialTest

N_BITS, PER_BATCH = 64, 24


class Reading:
    """An estimator to whose scores every batch adds ``answer(number)``."""

    def __init__(self, number, budget, answer):
        self.number, self.budget, self.answer = number, budget, answer
        self.n_probes = self.n_images = 0
        self.sum = np.zeros(N_BITS)

    def advance(self):
        self.budget.n_queries += PER_BATCH
        self.n_probes += PER_BATCH
        self.n_images += 1
        self.sum = self.sum + self.answer(self.number)
        return True

    def scores(self):
        return self.sum


class QueryBudget(SimpleNamespace):
    n_queries = 0

    @property
    def exhausted(self):
        return self.n_queries >= self.max_queries


def read(n_hypotheses, bits, answer, *, alpha, max_queries):
    budget, hypotheses = QueryBudget(max_queries=max_queries), []
    for number in range(n_hypotheses):
        looks = Looks(N_BITS, max_queries, alpha / n_hypotheses)
        test = SequentialTest(n_hypotheses=n_hypotheses, weight=looks.weight)
        hypotheses.append(
            Hypothesis(str(number), Reading(number, budget, answer), torch.from_numpy(bits), looks, test)
        )
    return (
        read_hypotheses(hypotheses, budget, alpha),
        min(hypotheses, key=lambda hypothesis: hypothesis.test.log10_p_value),
        budget,
    )


class Watching:
    """A server of arbitrary answers that change once an alignment is queried out of turn."""

    def __init__(self, generator, n_hypotheses, noise):
        self.patterns = generator.choice([-1.0, 1.0], (n_hypotheses, N_BITS))
        self.generator, self.noise = generator, noise
        self.queried = []

    def __call__(self, number):
        self.queried.append(number)
        counts = np.bincount(self.queried, minlength=len(self.patterns))
        weights = np.full(len(counts), -0.3)
        weights[number] = 3.0 if counts[number] > counts.min() + 1 else 1e6
        return np.sign(weights @ self.patterns + 1e-9) + self.noise * self.generator.standard_normal(N_BITS)


def queried_under(seed, n_hypotheses, max_queries):
    generator = np.random.default_rng(1)
    server = Watching(generator, n_hypotheses, 3.0)
    bits = np.random.default_rng(seed).integers(0, 2, N_BITS).astype(np.uint8)
    read(n_hypotheses, bits, server, alpha=1e-9, max_queries=max_queries)
    return server.queried


@pytest.mark.parametrize("n_hypotheses", [2, 3, 12])
def test_what_is_asked_next_tells_one_choice_of_the_signature(n_hypotheses):
    half = 1500 // PER_BATCH + 1
    runs = [queried_under(seed, n_hypotheses, 3000) for seed in range(8)]
    for queried in runs:
        assert queried[:half] == [i % n_hypotheses for i in range(len(queried[:half]))]
        assert len(set(queried[half:])) <= 1
    assert len({queried[-1] for queried in runs if len(queried) > half}) > 1  # it was a choice


@pytest.mark.parametrize("noise", [0.0, 3.0])
@pytest.mark.parametrize("n_hypotheses", [2, 12])
def test_a_server_that_watches_the_choice_gains_nothing(n_hypotheses, noise):
    generator, alpha, n_runs = np.random.default_rng(n_hypotheses), 0.05, 400
    n_false = 0
    for _ in range(n_runs):
        bits = generator.integers(0, 2, N_BITS).astype(np.uint8)
        stopped, best, _ = read(
            n_hypotheses, bits, Watching(generator, n_hypotheses, noise), alpha=alpha, max_queries=2000
        )
        assert (stopped == "proven") == (best.test.log10_p_value <= math.log10(alpha))
        n_false += stopped == "proven"
    assert stats.binomtest(n_false, n_runs, alpha, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize("n_hypotheses", [1, 2, 4, 12])
def test_the_best_alignment_gets_the_rest_of_the_budget(n_hypotheses):
    """Its responses are so noisy that its turns alone would not suffice."""
    generator = np.random.default_rng(5)
    bits = generator.integers(0, 2, N_BITS).astype(np.uint8)

    def answer(number):
        return (number == n_hypotheses - 1) * 0.12 * (2.0 * bits - 1) + generator.standard_normal(N_BITS)

    stopped, best, budget = read(n_hypotheses, bits, answer, alpha=1e-9, max_queries=8000)
    assert (stopped, best.name) == ("proven", str(n_hypotheses - 1))
    assert n_hypotheses <= 2 or best.estimator.n_probes > 1.5 * budget.max_queries / 2 / n_hypotheses


def test_a_reading_is_given_up_for_all_at_once():
    generator = np.random.default_rng(6)
    bits = generator.integers(0, 2, N_BITS).astype(np.uint8)
    against = -(2.0 * bits - 1)
    stopped, _, budget = read(3, bits, lambda _: against, alpha=1e-9, max_queries=100_000)
    assert stopped == "futile"
    assert budget.n_queries < 2000


def test_a_budget_that_ends_before_the_choice_is_looked_at():
    bits = np.ones(N_BITS, dtype=np.uint8)
    stopped, best, _ = read(
        3, bits, lambda number: np.full(N_BITS, float(number == 2)), alpha=1e-9, max_queries=30
    )
    assert stopped == "budget"
    stopped, best, _ = read(2, bits, lambda _: np.ones(N_BITS), alpha=1e-9, max_queries=40)
    assert (stopped, best.test.n_looks) == ("proven", 1)
