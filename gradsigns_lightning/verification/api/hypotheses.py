"""Several geometries of a server, asked about side by side.

Each alignment is a claim of its own, tested at alpha divided by their number K. They ask in turns for the first half of the
budget; then the one that agrees best with the signature gets the rest. That choice depends on the signature, and is paid for:
let there be K worlds, in each of which another claim is chosen beforehand. In its own world nothing that a claim asks depends on
the signature, so its test is exact there whatever the server makes of what it is asked, and no world's claim is false with more
than alpha / K. What happens in truth is one of these worlds, up to the choice all of them, so that alpha bounds the sum. A
second choice would tell the server more of the signature than has been paid for: so no claim leaves before the others, and the
reading is given up for all at once.
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
from gradsigns_lightning.verification.api.sequential import SequentialTest, Looks, integer_scores, is_futile

Stopped = Literal["proven", "futile", "budget", "images"]
_STEPS_TRIED = 4  # images until every length of step has been used


@dataclass
class Hypothesis:
    """One alignment, read and judged by itself.

    Attributes:
        name: the alignment.
        reading: asks, and gathers the evidence for each bit being 1.
        bits: the signature.
        looks: when to look at the evidence, which depends on answers only.
        evidence: what the looks found.
        hopeless: whether the last look gave it up.
    """

    name: str
    reading: RowEstimator | CoordinateEstimator
    bits: Tensor
    looks: Looks
    evidence: SequentialTest
    hopeless: bool = False

    def signed(self) -> Values:
        """Return the evidence for each bit, positive where it agrees with the signature."""
        signed: Values = signed_by(torch.from_numpy(self.reading.evidence()), self.bits).numpy()
        return signed

    def look(self) -> Values:
        """Test the evidence, and return it as :meth:`signed` does."""
        signed = self.signed()
        self.evidence.look(integer_scores(signed))
        return signed


def read_hypotheses(claims: Sequence[Hypothesis], budget: QueryBudget, alpha: float) -> Stopped:
    """Let the claims ask until one is proven, none can be, or images or budget are used up.

    A look is valid if its time does not depend on the signature. So looks stand where a claim's own probes and answers say
    (:class:`Looks`), where its images end, and where the budget ends.
    """
    active, is_chosen = list(claims), len(claims) == 1
    while active and not budget.exhausted:
        if not is_chosen and 2 * budget.n_queries >= budget.max_queries:
            active, is_chosen = [_most_promising(active)], True
        claim = min(active, key=lambda claim: claim.reading.n_probes)
        goes_on = claim.reading.advance()
        if goes_on and not claim.looks.due(claim.reading.n_probes, claim.evidence.n_looks, claim.reading.evidence()):
            continue
        signed = claim.look()
        if claim.evidence.log10_p_value <= math.log10(alpha):
            return "proven"
        claim.hopeless = _cannot_suffice(claim, signed, budget, alpha)
        if not goes_on:
            active = [other for other in active if other is not claim]
        elif all(other.hopeless for other in active):
            return "futile"
    for claim in active:
        claim.look()
    if any(claim.evidence.log10_p_value <= math.log10(alpha) for claim in active):
        return "proven"
    return "budget" if active else "images"


def _most_promising(active: Sequence[Hypothesis]) -> Hypothesis:
    hopeful = [claim for claim in active if not claim.hopeless] or active
    return min(hopeful, key=lambda claim: log10_sign_flip_p_value(integer_scores(claim.signed())))


def _cannot_suffice(claim: Hypothesis, signed: Values, budget: QueryBudget, alpha: float) -> bool:
    if not claim.looks.times:
        return claim.looks.is_over(signed)
    n_probes = claim.reading.n_probes
    left = budget.max_queries - budget.n_queries
    tried = claim.reading.n_images > _STEPS_TRIED
    return tried and is_futile(signed, n_probes=n_probes, max_probes=n_probes + left, alpha=alpha)
