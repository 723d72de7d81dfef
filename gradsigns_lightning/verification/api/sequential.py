"""The sequential test: when to look at the scores, and which share of alpha each look may spend.

Scores are looked at several times, so the smallest p-value seen would claim too much. Every look k has its
own exact test; its p-value is divided by a weight w_k fixed in advance, with the weights adding up to one at
most. By the union bound the smallest p_k / w_k is then a p-value however reading stops (Bonferroni's alpha
spending; Lan and DeMets, Biometrika 70, 1983, treat the general case). The queries never depend on the
signature's bits, only on responses, so each look's test is exact (except for one choice among several
hypotheses: :mod:`gradsigns_lightning.verification.api.hypotheses`).

The *times* of the looks may depend on the responses, too, as long as they do not depend on the signature:
given all responses, for a model that was not signed with the key the signature is still uniform at every such
time, each look's p-value is exact, and the union bound over the planned number of looks holds as before. So a
key with so few bits that it can afford only some looks takes them when its bits have settled, that is when no
bit has changed while the scores grew (:meth:`Looks.due`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradsigns_lightning.core.statistics import log10_sign_flip_p_value, ownership_p_value

FIRST_LOOK = 40  # probes; fewer can hardly reach the default alpha
_GROWTH = 1.3
_LEVELS = 31
_LARGEST_SUM_PER_BIT = 4096  # keeps the exact test under a second
_CLIP = 3.0  # in root mean squares: one outlier must not outweigh the rest
# growth of the scores without a change of sign that settles the bits; more where a look cannot be repeated
_SETTLED, _SETTLED_FOR_ONE_LOOK = 1.5, 3.0
_LEAST_SETTLED = 0.75  # share of settled bits that agree; noise does not explain a smaller one
_LEAST_CHANCE = 0.01  # of a proof, below which reading ends


def look_weight(index: int) -> float:
    """Return w_k = 1 / (k (k + 1)) of look ``index`` = k >= 1; over all k the weights add up to one."""
    return 1 / (index * (index + 1))


class Looks:
    """Schedules the looks and their shares of alpha, without regard to the signature.

    Looks form a geometric series with the weights w_k; the last one is taken when reading ends. If a key has
    too few bits to reach alpha at every look of the series, the looks share alpha equally. If all bits
    together cannot reach it even then, there are as many looks as they can afford (at least one), taken when
    the bits have settled; the last of several is reserved for the end.

    Args:
        n_bits: number of bits that are read.
        max_probes: most probes that there can be.
        alpha: significance level of the hypothesis.

    Attributes:
        times: numbers of probes after which to look, ascending; empty if looks wait for settled bits.
        n_equal: number of looks that share alpha equally, None for the weights w_k.
    """

    def __init__(self, n_bits: int, max_probes: int, alpha: float) -> None:
        series = [max_probes]
        while series[-1] / _GROWTH >= FIRST_LOOK:
            series.append(int(series[-1] / _GROWTH))
        smallest = 2.0 ** -min(n_bits, 1000)
        can_be_equal = int(min(len(series), alpha / smallest))
        self.times = tuple(reversed(series)) if can_be_equal == len(series) else ()
        self.n_equal = None if look_weight(len(series)) * alpha >= smallest else max(1, can_be_equal)
        self._least_decided = min(n_bits, math.ceil(math.log2((self.n_equal or 1) / alpha)))
        self._signs = np.zeros(n_bits)
        self._size = math.inf
        self._seen: set[bytes] = set()

    def weight(self, index: int) -> float:
        """Return the share of alpha of look ``index`` = 1, 2, ...; the shares add up to one at most."""
        if self.n_equal is None:
            return look_weight(index)
        return 1 / self.n_equal if index <= self.n_equal else 0.0

    def due(self, n_probes: int, n_looks: int, scores: npt.NDArray[np.float64]) -> bool:
        """Tell whether to look now; to be called after every batch.

        Args:
            n_probes: number of probes queried.
            n_looks: number of looks taken.
            scores: each bit's score, not compared with the signature.
        """
        if self.times:
            return n_probes >= self.times[min(n_looks, len(self.times) - 1)]
        signs, size = np.sign(np.nan_to_num(scores)), float(np.abs(np.nan_to_num(scores)).sum())
        if (signs != self._signs).any():
            self._signs, self._size = signs, size
        assert self.n_equal is not None
        growth = _SETTLED if self.n_equal > 1 else _SETTLED_FOR_ONE_LOOK
        settled = np.count_nonzero(signs) >= self._least_decided and size >= growth * self._size
        if not settled or signs.tobytes() in self._seen or n_looks >= max(1, self.n_equal - 1):
            return False
        self._seen.add(signs.tobytes())
        return True

    def is_over(self, signed: npt.NDArray[np.float64]) -> bool:
        """Tell after a look at settled bits whether another is pointless; otherwise see :func:`is_futile`."""
        return self.n_equal == 1 or float(np.mean(signed[signed != 0] > 0)) < _LEAST_SETTLED


def integer_scores(scores: npt.NDArray[np.float64]) -> list[int]:
    """Round scores to integers for the exact test; the largest becomes 31, less for thousands of bits."""
    scores = np.where(np.isfinite(scores), scores, 0)
    decided = scores[scores != 0]
    if decided.size == 0:
        return [0] * scores.size
    # scaled first, because tiny values would underflow when squared, and huge ones overflow
    scores = scores / np.abs(decided).max()
    decided = scores[scores != 0]
    largest = min(np.abs(decided).max(), _CLIP * math.sqrt(np.mean(decided**2)))
    levels = max(1, min(_LEVELS, _LARGEST_SUM_PER_BIT // scores.size))
    sizes = np.maximum(np.rint(np.minimum(np.abs(scores), largest) / largest * levels), scores != 0)
    return [int(size) for size in np.sign(scores) * sizes]


@dataclass
class SequentialTest:
    """Keeps the smallest corrected p-value of all looks.

    Attributes:
        n_hypotheses: number of alignments tested side by side; every p-value is multiplied by it.
        n_looks: number of looks taken.
        weight: returns the share of alpha of each look.
        log10_p_value: base-10 logarithm of the smallest corrected p-value, at most 0.
    """

    n_hypotheses: int = 1
    weight: Callable[[int], float] = look_weight
    n_looks: int = 0
    log10_p_value: float = 0.0

    def look(self, scores: Sequence[int]) -> None:
        """Test signed integer scores (see :func:`sign_flip_p_value`)."""
        self.n_looks += 1
        weight = self.weight(self.n_looks)
        if weight == 0:
            return
        corrected = log10_sign_flip_p_value(scores) - math.log10(weight / self.n_hypotheses)
        self.log10_p_value = min(self.log10_p_value, corrected)


def is_futile(signed: npt.NDArray[np.float64], *, n_probes: int, max_probes: int, alpha: float) -> bool:
    """Tell whether even an optimistic continuation stays short of ``alpha``.

    The statistic t is the sum of the signed scores over its standard deviation under the null hypothesis. Its
    mean may be three standard deviations better than it looks, and noise averages out as probes are added.
    Stopping here can only lose power, never validity.
    """
    decided = signed[np.isfinite(signed) & (signed != 0)]
    if decided.size < FIRST_LOOK / 2:
        return False
    n = decided.size
    optimistic = (decided.sum() / math.sqrt(np.sum(decided**2)) + 3) / math.sqrt(n)
    if optimistic >= 1:
        return False
    signal_to_noise = optimistic / math.sqrt(1 - optimistic**2) if optimistic > 0 else 0.0
    final = signal_to_noise * math.sqrt(max_probes / n_probes)
    reachable = math.sqrt(signed.size) * final / math.sqrt(1 + final**2)
    if reachable**2 >= 2 * math.log(1 / alpha):  # Hoeffding's bound on random signs: p <= exp(-t^2 / 2)
        return False
    return _chance(signed.size, (1 + math.erf(final / math.sqrt(2))) / 2, alpha) < _LEAST_CHANCE


def _chance(n_bits: int, share: float, alpha: float) -> float:
    """Return the probability that enough bits are right if each one is with probability ``share``.

    For few bits Hoeffding's bound would say that not even all of them are enough.
    """
    log_of = [math.lgamma(n + 1) for n in range(n_bits + 1)]
    enough = [k for k in range(n_bits + 1) if ownership_p_value(k, n_bits) <= alpha]
    share = min(share, 1 - 1e-12)
    return sum(
        math.exp(
            log_of[n_bits]
            - log_of[k]
            - log_of[n_bits - k]
            + k * math.log(share)
            + (n_bits - k) * math.log1p(-share)
        )
        for k in enough
    )
