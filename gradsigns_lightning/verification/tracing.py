"""Tracing: which customer's copy a model is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from gradsigns_lightning.core.key import WatermarkKey, key_of
from gradsigns_lightning.core.key.payload import (
    MAX_CUSTOMERS,
    check_master,
    check_traceable,
    customer_key_of,
)
from gradsigns_lightning.core.result import (
    DEFAULT_ALPHA,
    Verdict,
    bits_in_words,
    check_alpha,
    count_bits,
    is_recognised,
    recognised_in_words,
    three_lines,
    verdict_of,
    why_inconclusive,
    without_nan,
)
from gradsigns_lightning.core.statistics import log10_sign_flip_p_value
from gradsigns_lightning.core.utils.checks import check_int
from gradsigns_lightning.verification.api.queries import Oracle
from gradsigns_lightning.verification.api.sequential import integer_scores
from gradsigns_lightning.verification.images import warn_if_unlike
from gradsigns_lightning.verification.suspects import read_scores

Scores = npt.NDArray[np.float64]
_NEAR = 1e-3  # p-value at which a second mark counts, so that a near-tie names nobody


@dataclass(frozen=True)
class TraceResult:
    """Whose copy a model is; ``print`` shows it in three lines.

    Attributes:
        customer: number of the customer whose signature fits best, 0 to ``n_customers - 1``.
        n_customers: customers that were compared.
        n_bits: bits of the key.
        n_matches: decided bits that equal this customer's signature.
        n_erasures: bits that the reading could not decide.
        next_n_matches: ``n_matches`` of the customer who fits next best.
        p_value: probability that any customer whose copy had no part in the model fits as well, at most 1,
            whatever other customers' marks the model holds: the exact p-value of one customer
            (:func:`sign_flip_p_value`, bits weighted by how clearly they were read) times ``n_customers``;
            NaN when no bit was decided. Nothing is charged for a payload: a master has none, and the
            customers' signatures follow from its secret.
        log10_p_value: base-10 logarithm of ``p_value``.
        present: customers whose marks are in the model, each with a p-value of its own of at most ``alpha``,
            clearest first: one for a copy, several for a mixture of copies.
        mixed: whether the model shows a second mark, another customer's or the master's own, as it is or
            inverted (p <= 1e-3, or ``alpha`` if that is larger, for all of them together). Then the model is
            not a single customer's copy. A second mark that is much fainter, or was subtracted, may not show;
            even then the customer named had a part in the model.
        is_master: whether the model shows the master's own mark (p <= alpha).
        n_queries: number of images that were sent to the model.
        alpha: significance level of the verdict.
        verdict: ``"owned"`` if the copy is this customer's (p <= alpha, and not mixed), else ``"not_proven"``
            or ``"inconclusive"``.
        commitment: public commitment of the customer's key.
        recognised: share of the natural images that the model classifies as the target class.
    """

    customer: int
    n_customers: int
    n_bits: int
    n_matches: int
    n_erasures: int
    next_n_matches: int
    p_value: float
    log10_p_value: float
    present: tuple[int, ...]
    mixed: bool
    is_master: bool
    n_queries: int
    alpha: float
    verdict: Verdict
    commitment: str
    recognised: float

    def __str__(self) -> str:
        """Return the verdict and why, bits and p-value, and what was read, a line each."""
        bits = bits_in_words(self.n_matches, self.n_bits, self.n_erasures, self.log10_p_value)
        nearest = f"customer {self.customer}, the nearest of {self.n_customers}"
        return three_lines(
            self.verdict,
            self.reason,
            f"{nearest}: {bits}; {self.next_n_matches} match the next",
            f"{self.n_queries} images queried{recognised_in_words(self.recognised)}",
        )

    @property
    def reason(self) -> str:
        """Why the verdict is what it is, in words."""
        if self.verdict == "inconclusive":
            return why_inconclusive(self.recognised, "the gradient or the answers tell nothing")
        if self.verdict == "owned":
            return f"the copy of customer {self.customer}, p <= alpha = {self.alpha:g}"
        if self.is_master and not self.present:
            return (
                "only the master's own mark shows, so the model is, or was made from, one of the owner's own"
            )
        if self.mixed:
            return "more than one mark shows, so the model is not a single customer's copy"
        return f"p > alpha = {self.alpha:g} for every customer"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types; NaN becomes None."""
        return {**without_nan(vars(self)), "present": list(self.present)}


def trace(
    suspect: nn.Module | Oracle,
    master: WatermarkKey | str | PathLike[str],
    images: Tensor,
    *,
    n_customers: int = 10_000,
    alpha: float = DEFAULT_ALPHA,
    max_queries: int = 1000,
) -> TraceResult:
    """Tell which customer's copy a model is, from one reading.

    The bits are read once and correlated with every customer's signature (:func:`customer_key`). An innocent
    customer's signature is independent of everything that is in the model, however many customers mixed their
    copies to make it, so the p-value holds for mixtures as well: as long as neither the master's key nor the
    innocent customer's own was opened, and nobody who made the model saw figures of earlier traces.

    Args:
        suspect: a ``torch.nn.Module`` that returns logits, read from its weights; anything else is queried
            like a prediction API.
        master: the key that the customers' keys were made from, or its file; 44 bits or more for the
            defaults, 128 to be safe.
        images: natural images of the target class, raw in [0, 1], shape ``(n, C, H, W)``; 50 or more.
        n_customers: number of customers who have a copy, 2 to 65536; the p-value is corrected for it.
        alpha: significance level of the verdict.
        max_queries: most images that may be sent to a prediction API.

    Raises:
        ValueError: an argument is out of range, or the master is too short, of version 1 or has a payload.
        TypeError: an argument has the wrong type.
    """
    check_int("n_customers", n_customers, minimum=2, maximum=MAX_CUSTOMERS)
    check_alpha(alpha)
    master = key_of(master, argument="master")
    check_master(master)
    check_traceable(master.n_bits, n_customers=n_customers, alpha=alpha)
    scores, n_queries, recognised, n_classified = read_scores(
        suspect, master, images, max_queries=max_queries
    )
    result = decode(
        scores, master, n_customers=n_customers, alpha=alpha, n_queries=n_queries, recognised=recognised
    )
    warn_if_unlike([result], len(images), master.target_class, n_classified=n_classified, stacklevel=2)
    return result


def decode(
    scores: Scores,
    master: WatermarkKey,
    *,
    n_customers: int,
    alpha: float,
    n_queries: int,
    recognised: float,
) -> TraceResult:
    """Tell whose signature the scores show.

    Args:
        scores: how clearly each bit was read as 1 (above 0) or as 0 (below 0), 0 for an erasure; shape
            ``(N,)``.
        master: the key that the customers' keys were made from.
        n_customers: number of customers who have a copy.
        alpha: significance level of the verdict.
        n_queries: number of images that were sent to the model.
        recognised: share of the natural images that the model classifies as the target class.
    """
    integers = np.array(integer_scores(scores))
    decided, recognises = bool(integers.any()), is_recognised(recognised)
    marks = _Marks(master, n_customers, integers)
    best, second = np.argsort(-marks.totals[:-1], kind="stable")[:2]
    log10_p_value = min(0.0, marks.log10_p_value(best, n_customers)) if decided else math.nan
    present = marks.present(alpha) if decided and recognises else ()
    mixed = decided and (len(present) > 1 or marks.clearest_other(best) <= max(_NEAR, alpha))
    verdict = verdict_of(10**log10_p_value, alpha, recognised)
    counts = count_bits(marks.signed(best))
    return TraceResult(
        customer=int(best),
        n_customers=n_customers,
        n_bits=master.n_bits,
        n_matches=counts.n_matches,
        n_erasures=counts.n_erasures,
        next_n_matches=count_bits(marks.signed(second)).n_matches,
        p_value=10**log10_p_value,
        log10_p_value=log10_p_value,
        present=present,
        mixed=mixed,
        is_master=decided and recognises and marks.log10_p_value(n_customers, 1) <= math.log10(alpha),
        n_queries=n_queries,
        alpha=alpha,
        verdict="not_proven" if mixed and verdict == "owned" else verdict,
        commitment=marks.key(int(best)).commitment,
        recognised=recognised,
    )


class _Marks:
    """Compares integer scores ``(N,)`` with the signatures of all customers and, last, the master's own."""

    def __init__(self, master: WatermarkKey, n_customers: int, scores: npt.NDArray[np.int64]) -> None:
        self._master, self._scores = master, scores
        self._signatures = np.concatenate(
            [master.customer_signatures(n_customers), master.signature.numpy()[None]]
        )
        # Integers below 2^24, which float32 represents exactly; some customers at a time, to save memory.
        parts = np.array_split(self._signatures, max(1, self._signatures.size >> 24))
        weights = scores.astype(np.float32)
        self.totals = (
            np.concatenate([2 * (part.astype(np.float32) @ weights) for part in parts]) - weights.sum()
        )

    def key(self, customer: int) -> WatermarkKey:
        """Return a customer's key."""
        return customer_key_of(self._master, customer)

    def signed(self, which: Any) -> npt.NDArray[np.int64]:
        """Return the scores, positive where they agree with a signature."""
        return np.where(self._signatures[which] == 1, self._scores, -self._scores)

    def log10_p_value(self, which: Any, n_hypotheses: int, *, side: int = 1) -> float:
        """Return the p-value of a signature, or with ``side=-1`` of its opposite, times ``n_hypotheses``."""
        signed = side * self.signed(which)
        return log10_sign_flip_p_value([int(score) for score in signed]) + math.log10(n_hypotheses)

    def present(self, alpha: float) -> tuple[int, ...]:
        """Return the customers whose marks show, clearest first."""
        found: list[int] = []
        for customer in np.argsort(-self.totals[:-1], kind="stable"):
            if self.log10_p_value(customer, len(self.totals) - 1) > math.log10(alpha):
                break
            found.append(int(customer))
        return tuple(found)

    def clearest_other(self, best: Any) -> float:
        """Return the p-value of the clearest mark besides ``best``, inverted or not, among all others."""
        others = np.delete(np.arange(len(self.totals)), best)
        clearest = others[np.argmax(np.abs(self.totals[others]))]
        side = 1 if self.totals[clearest] >= 0 else -1
        return float(10 ** self.log10_p_value(clearest, 2 * len(others), side=side))
