"""Testing several alignments side by side.

Each alignment is a hypothesis of its own, tested at alpha divided by their number K. They take turns for the
first half of the budget; then the one that agrees best with the signature gets the rest. That choice depends
on the signature, and the division by K pays for it: imagine K worlds, in each of which a different hypothesis
is chosen in advance. In its own world none of a hypothesis's queries depends on the signature, so its test is
exact there, however the server reacts to the queries, and accepts a false hypothesis with probability alpha /
K at most. What really happens is one of these worlds, which do not differ before the choice, so alpha bounds
the sum. A second choice would tell the server more about the signature than has been paid for. So no
hypothesis leaves before the others, and futility ends the reading for all at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradsigns_lightning.core.key.signature_key import SignatureKey
from gradsigns_lightning.core.result import signed_by
from gradsigns_lightning.core.statistics import log10_sign_flip_p_value
from gradsigns_lightning.verification.api.boundary import BoundaryImages
from gradsigns_lightning.verification.api.estimators import CoordinateEstimator, RowEstimator
from gradsigns_lightning.verification.api.probes import alignment
from gradsigns_lightning.verification.api.queries import QueryBudget
from gradsigns_lightning.verification.api.responses import Values
from gradsigns_lightning.verification.api.sequential import Looks, SequentialTest, integer_scores, is_futile
from gradsigns_lightning.verification.api.settings import ApiSettings

Stopped = Literal["proven", "futile", "budget", "images"]
_STEPS_TRIED = 4  # images after which every step size has been used


@dataclass
class Hypothesis:
    """One alignment with its own estimator and test.

    Attributes:
        name: the alignment.
        estimator: sends the queries and gathers each bit's score.
        bits: the signature.
        looks: when to look at the scores; depends on responses only.
        test: the result of the looks so far.
        is_futile: whether the last look found that the rest of the budget cannot suffice.
    """

    name: str
    estimator: RowEstimator | CoordinateEstimator
    bits: Tensor
    looks: Looks
    test: SequentialTest
    is_futile: bool = False

    def signed(self) -> Values:
        """Return each bit's score, positive where it agrees with the signature."""
        signed: Values = signed_by(torch.from_numpy(self.estimator.scores()), self.bits).numpy()
        return signed

    def look(self) -> Values:
        """Test the scores, and return them as :meth:`signed` does."""
        signed = self.signed()
        self.test.look(integer_scores(signed))
        return signed


def make_hypotheses(
    key: SignatureKey,
    budget: QueryBudget,
    boundary: BoundaryImages,
    directions: Tensor,
    bits: Tensor,
    settings: ApiSettings,
) -> list[Hypothesis]:
    """Return a hypothesis for each alignment of the settings.

    Args:
        key: the owner's key.
        budget: what the estimators query with.
        boundary: the images that they probe around.
        directions: the directions of the probes, shape ``(n, C, H, W)``; unused along single coordinates.
        bits: each direction's bit of the signature, shape ``(n,)``.
        settings: the alignments, the estimator and alpha.
    """
    by_coordinate, names = settings.estimator == "coordinate", settings.alignments

    def estimator(name: str) -> RowEstimator | CoordinateEstimator:
        align = alignment(name)
        if by_coordinate:
            return CoordinateEstimator(budget, boundary, key, align)
        return RowEstimator(budget, boundary, directions, align)

    signature = key.signature if by_coordinate else bits
    schedules = [Looks(len(signature), budget.max_queries, settings.alpha / len(names)) for _ in names]
    return [
        Hypothesis(
            name,
            estimator(name),
            signature,
            looks,
            SequentialTest(n_hypotheses=len(names), weight=looks.weight),
        )
        for name, looks in zip(names, schedules, strict=True)
    ]


def read_hypotheses(hypotheses: Sequence[Hypothesis], budget: QueryBudget, alpha: float) -> Stopped:
    """Query for the hypotheses in turn until one is proven, none can be, or images or budget are used up.

    A look is valid if its time does not depend on the signature. So a hypothesis is looked at when its own
    probes and responses say so (:class:`Looks`), when its images end, and when the budget ends.
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
        hypothesis.is_futile = _cannot_suffice(hypothesis, signed, budget, alpha)
        if not goes_on:
            active = [other for other in active if other is not hypothesis]
        elif all(other.is_futile for other in active):
            return "futile"
    for hypothesis in active:
        hypothesis.look()
    if any(hypothesis.test.log10_p_value <= math.log10(alpha) for hypothesis in active):
        return "proven"
    return "budget" if active else "images"


def _most_promising(active: Sequence[Hypothesis]) -> Hypothesis:
    candidates = [hypothesis for hypothesis in active if not hypothesis.is_futile] or active
    return min(
        candidates, key=lambda hypothesis: log10_sign_flip_p_value(integer_scores(hypothesis.signed()))
    )


def _cannot_suffice(hypothesis: Hypothesis, signed: Values, budget: QueryBudget, alpha: float) -> bool:
    if not hypothesis.looks.times:
        return hypothesis.looks.is_over(signed)
    n_probes = hypothesis.estimator.n_probes
    max_probes = n_probes + budget.max_queries - budget.n_queries
    all_steps_tried = hypothesis.estimator.n_images > _STEPS_TRIED
    return all_steps_tried and is_futile(signed, n_probes=n_probes, max_probes=max_probes, alpha=alpha)
