"""When to look at the evidence, and what each look may claim.

Answers to queries are looked at several times, so the smallest p-value seen would claim too much. Every look k has its own exact
test; its p-value is divided by a weight w_k fixed in advance, with the weights adding up to one at most. By the union bound the
smallest p_k / w_k is then a p-value however reading stops (Bonferroni's alpha spending; Lan and DeMets, Biometrika 70, 1983,
treat the general case). The queries never depend on the signature's bits, only on answers, so each look's test is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradsigns_lightning.core.statistics import log10_sign_flip_p_value

FIRST_LOOK = 40  # probes; fewer can hardly reach the default alpha
_GROWTH = 1.3
_LEVELS = 31
_LARGEST_SUM_PER_BIT = 4096  # keeps the exact test under a second
_CLIP = 3.0  # in root mean squares: one wild answer must not outweigh the rest


def look_weight(index: int) -> float:
    """Return w_k = 1 / (k (k + 1)) of look ``index`` = k >= 1; over all k the weights add up to one."""
    return 1 / (index * (index + 1))


def look_schedule(n_bits: int, max_probes: int, alpha: float) -> tuple[int, ...]:
    """Return after how many probes to look, ascending.

    Looks are a geometric series. Short keys can afford only the looks whose weight still lets all bits together reach ``alpha``;
    the last look is always at ``max_probes``.
    """
    n_looks = 1
    while n_looks < 64 and look_weight(n_looks + 1) * alpha >= 2.0 ** -min(n_bits, 1000):
        n_looks += 1
    series = [max_probes]
    while len(series) < n_looks and series[-1] / _GROWTH >= FIRST_LOOK:
        series.append(int(series[-1] / _GROWTH))
    return tuple(reversed(series))


def integer_scores(evidence: npt.NDArray[np.float64]) -> list[int]:
    """Round signed evidence to whole numbers for the exact test; the largest becomes 31, less for thousands of bits."""
    evidence = np.where(np.isfinite(evidence), evidence, 0)
    decided = evidence[evidence != 0]
    if decided.size == 0:
        return [0] * evidence.size
    evidence = evidence / np.abs(decided).max()  # first, because tiny values vanish when they are squared, and huge ones overflow
    decided = evidence[evidence != 0]
    largest = min(np.abs(decided).max(), _CLIP * math.sqrt(np.mean(decided**2)))
    levels = max(1, min(_LEVELS, _LARGEST_SUM_PER_BIT // evidence.size))
    sizes = np.maximum(np.rint(np.minimum(np.abs(evidence), largest) / largest * levels), evidence != 0)
    return [int(size) for size in np.sign(evidence) * sizes]


@dataclass
class Evidence:
    """The smallest corrected p-value so far.

    Attributes:
        n_hypotheses: claims tested side by side (alignments); every p-value is multiplied by it.
        n_looks: looks taken.
        log10_p_value: base-10 logarithm of the smallest corrected p-value, at most 0.
    """

    n_hypotheses: int = 1
    n_looks: int = 0
    log10_p_value: float = 0.0

    def look(self, scores: Sequence[int]) -> None:
        """Test signed integer scores (see :func:`sign_flip_p_value`)."""
        self.n_looks += 1
        corrected = log10_sign_flip_p_value(scores) - math.log10(look_weight(self.n_looks) / self.n_hypotheses)
        self.log10_p_value = min(self.log10_p_value, corrected)


def is_futile(evidence: npt.NDArray[np.float64], *, n_probes: int, max_probes: int, alpha: float) -> bool:
    """Tell whether even an optimistic continuation stays short of ``alpha``.

    The sum of the signed evidence over its standard deviation under the null is t. Its mean may be three standard deviations
    better than it looks, and noise averages out as probes are added. Stopping here can only lose power, never validity.
    """
    decided = evidence[np.isfinite(evidence) & (evidence != 0)]
    if decided.size < FIRST_LOOK / 2:
        return False
    n = decided.size
    optimistic = (decided.sum() / math.sqrt(np.sum(decided**2)) + 3) / math.sqrt(n)
    if optimistic >= 1:
        return False
    signal_to_noise = optimistic / math.sqrt(1 - optimistic**2) if optimistic > 0 else 0.0
    final = signal_to_noise * math.sqrt(max_probes / n_probes)
    reachable = math.sqrt(evidence.size) * final / math.sqrt(1 + final**2)
    return reachable**2 < 2 * math.log(1 / alpha)  # Hoeffding's bound on random signs: p <= exp(-t^2 / 2)
