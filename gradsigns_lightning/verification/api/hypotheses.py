"""Several geometries of a server, asked about side by side.

Each alignment is a claim of its own, tested at alpha divided by their number K. They ask in turns for the
first half of the budget; then the one that agrees best with the signature gets the rest. That choice depends
on the signature, and is paid for: let there be K worlds, in each of which another hypothesis is chosen
beforehand. In its own world nothing that a hypothesis asks depends on the signature, so its test is exact
there whatever the server makes of what it is asked, and no world's hypothesis is false with more than alpha /
K. What happens in truth is one of these worlds, up to the choice all of them, so that alpha bounds the sum. A
second choice would tell the server more of the signature than has been paid for: so no claim leaves before
the others, and the reading is given up for all at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradsigns_lightning.core.result import signed_by
from gradsigns_lightning.core.statistics import log10_sign_flip_p_value
from gradsigns_lightning.verification.api.estimators import CoordinateEstimator, RowEstimator
from gradsigns_lightning.verification.api.queries import QueryBudget
from gradsigns_lightning.verification.api.responses import Values
from gradsigns_lightning.verification.api.sequential import Looks, SequentialTest, integer_scores, is_futile

Stopped = Literal["proven", "futile", "budget", "images"]
_STEPS_TRIED = 4  # images until every length of step has been used


@dataclass
class Hypothesis:
    """One alignment, read and judged by itself.

    Attributes:
        name: the alignment.
        estimator: asks, and gathers the evidence for each bit being 1.
        bits: the signature.
        looks: when to look at the evidence, which depends on answers only.
        test: what the looks found.
        hopeless: whether the last look gave it up.
    """

    name: str
    estimator: RowEstimator | CoordinateEstimator
    bits: Tensor
    looks: Looks
    test: SequentialTest
    hopeless: bool = False

    def signed(self) -> Values:
        """Return the evidence for each bit, positive where it agrees with the signature."""
        signed: Values = signed_by(torch.from_numpy(self.estimator.scores()), self.bits).numpy()
        return signed

    def look(self) -> Values:
        """Test the evidence, and return it as :meth:`signed` does."""
        signed = self.signed()
        self.test.look(integer_scores(signed))
        return signed


def read_hypotheses(hypotheses: Sequence[Hypothesis], budget: QueryBudget, alpha: float) -> Stopped:
    """Let the hypotheses ask until one is proven, none can be, or images or budget are used up.

    A look is valid if its time does not depend on the signature. So looks stand where a claim's own probes
    and answers say (:class:`Looks`), where its images end, and where the budget ends.
    """
    active, is_chosen = list(hypotheses), len(hypotheses) == 1
    while active and not budget.exhausted:
        if not is_chosen and 2 * budget.n_queries >= budget.max_queries:
            active, is_chosen = [_most_promising(active)], True
        hypothesis = min(active, key=lambda hypothesis: hypothesis.estimator.n_probes)
        goes_on = hypothesis.estimator.advance()
        if goes_on and not hypothesis.looks.due(
            hypothesis.estimator.n_probes, hypothesis.test.n_looks, hypothesis.estimator.scores()
        ):
            continue
        signed = hypothesis.look()
        if hypothesis.test.log10_p_value <= math.log10(alpha):
            return "proven"
        hypothesis.hopeless = _cannot_suffice(hypothesis, signed, budget, alpha)
        if not goes_on:
            active = [other for other in active if other is not hypothesis]
        elif all(other.hopeless for other in active):
            return "futile"
    for hypothesis in active:
        hypothesis.look()
    if any(hypothesis.test.log10_p_value <= math.log10(alpha) for hypothesis in active):
        return "proven"
    return "budget" if active else "images"


def _most_promising(active: Sequence[Hypothesis]) -> Hypothesis:
    hopeful = [hypothesis for hypothesis in active if not hypothesis.hopeless] or active
    return min(hopeful, key=lambda hypothesis: log10_sign_flip_p_value(integer_scores(hypothesis.signed())))


def _cannot_suffice(hypothesis: Hypothesis, signed: Values, budget: QueryBudget, alpha: float) -> bool:
    if not hypothesis.looks.times:
        return hypothesis.looks.is_over(signed)
    n_probes = hypothesis.estimator.n_probes
    left = budget.max_queries - budget.n_queries
    tried = hypothesis.estimator.n_images > _STEPS_TRIED
    return tried and is_futile(signed, n_probes=n_probes, max_probes=n_probes + left, alpha=alpha)
