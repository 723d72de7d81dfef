"""From z, or an API's scores, to bits, bit error rate, p-value, margin and verdict, for every reader."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from gradsigns_lightning.core.key.payload import free_bits
from gradsigns_lightning.core.key.reach import USUAL_ALPHA, for_whom, least_bits, log10_charged
from gradsigns_lightning.core.key.signature_key import SignatureKey
from gradsigns_lightning.core.statistics import log10_ownership_p_value, ownership_p_value
from gradsigns_lightning.core.utils.checks import check_number

if TYPE_CHECKING:
    # Not at runtime, so that a commitment, which needs only the default alpha, does not wait for torch.
    from torch import Tensor

Verdict = Literal["owned", "not_proven", "inconclusive"]
DEFAULT_ALPHA = USUAL_ALPHA
LEAST_RECOGNISED = 0.5
_MOST_DIGITS = 300


def signed_by(values: Tensor, signature: Tensor) -> Tensor:
    """Return ``(2 b_j - 1) z_j``, positive where a value agrees with the signature; shape ``(..., N)``."""
    return (2 * signature.to(values.dtype) - 1) * values


def is_readable(values: Tensor) -> Tensor:
    """Return whether values are all finite and not all zero, a scalar bool; otherwise they tell nothing."""
    return values.isfinite().all() & (values != 0).any()


def readable(values: Tensor) -> Tensor:
    """Return z, or zeros if any of it is non-finite: without a gradient every bit is an erasure."""
    return values if bool(is_readable(values)) else values.new_zeros(values.shape)


@dataclass(frozen=True)
class BitCounts:
    """How many bits of a reading match a signature.

    Attributes:
        n_bits: bits of the signature.
        n_matches: decided bits that equal the signature's.
        n_erasures: exact ties, which count neither for nor against.
    """

    n_bits: int
    n_matches: int
    n_erasures: int

    @property
    def n_decided(self) -> int:
        """Number of bits that are not erasures."""
        return self.n_bits - self.n_erasures

    @property
    def bit_error_rate(self) -> float:
        """Share of decided bits that differ, in [0, 1]; NaN when no bit was decided."""
        return (self.n_decided - self.n_matches) / self.n_decided if self.n_decided else math.nan

    @property
    def p_value(self) -> float:
        """Exact probability that an unmarked model matches as well; NaN when no bit was decided."""
        return ownership_p_value(self.n_matches, self.n_decided) if self.n_decided else math.nan

    @property
    def log10_p_value(self) -> float:
        """Base-10 logarithm of the p-value, which does not underflow."""
        return log10_ownership_p_value(self.n_matches, self.n_decided) if self.n_decided else math.nan


def count_bits(signed: Tensor | npt.NDArray[Any]) -> BitCounts:
    """Count matches and erasures of :func:`readable` values ``(N,)``, :func:`signed_by` the signature."""
    n_bits = len(signed)
    return BitCounts(n_bits, int((signed > 0).sum()), n_bits - int((signed != 0).sum()))


@dataclass(frozen=True)
class ReadingResult(ABC):
    """The result of a reading, of weights or of an API's responses.

    Subclasses define what a bit is, and give the reason of the verdict.
    """

    n_bits: int
    n_matches: int
    n_erasures: int
    bit_error_rate: float
    p_value: float
    log10_p_value: float
    margin: float
    n_queries: int
    alpha: float
    verdict: Verdict
    commitment: str
    recognised: float
    free_bits: float

    @classmethod
    def of(
        cls,
        signed: npt.NDArray[np.float64],
        key: SignatureKey,
        *,
        n_queries: int,
        alpha: float,
        recognised: float,
        log10_p_value: float | None = None,
        unit: float = 1.0,
        **details: Any,
    ) -> Self:
        """Return the result of a reading.

        Args:
            signed: score of each bit, positive where it agrees with the signature, zero for an erasure; shape
                ``(N,)``.
            key: the owner's key.
            n_queries: number of images that the model was queried with.
            alpha: significance level.
            recognised: share of the images that the model classifies as the target class; NaN if not known.
            log10_p_value: base-10 logarithm of the p-value, if a test other than that of :class:`BitCounts`
                was made.
            unit: unit of the margin.
            details: further fields of the class.
        """
        counts = count_bits(signed)
        p_value, log10 = counts.p_value, counts.log10_p_value
        if log10_p_value is not None and counts.n_decided:
            p_value, log10 = 10**log10_p_value, log10_p_value
        return cls(
            n_bits=counts.n_bits,
            n_matches=counts.n_matches,
            n_erasures=counts.n_erasures,
            bit_error_rate=counts.bit_error_rate,
            p_value=p_value,
            log10_p_value=log10,
            margin=float(signed.min()) / unit if counts.n_decided else math.nan,
            n_queries=n_queries,
            alpha=alpha,
            verdict=verdict_of(p_value, alpha, recognised),
            commitment=key.commitment,
            recognised=recognised,
            free_bits=free_bits(key),
            **details,
        )

    @property
    def log10_charged_p_value(self) -> float:
        """Base-10 logarithm of the p-value times ``2 ** free_bits``, at most 0."""
        return log10_charged(self.log10_p_value, free_bits=self.free_bits)

    def __str__(self) -> str:
        """Return three lines: the verdict and its reason, bits and p-value, and what was read."""
        return three_lines(self.verdict, self.reason, self._bits_and_p_value, self._what_was_read)

    @property
    @abstractmethod
    def reason(self) -> str:
        """Why the verdict is what it is, in words."""

    @property
    def _for_whom(self) -> str:
        return for_whom(self.log10_p_value, free_bits=self.free_bits, alpha=self.alpha)

    @property
    def _bits_and_p_value(self) -> str:
        return bits_in_words(self.n_matches, self.n_bits, self.n_erasures, self.log10_p_value)

    @property
    @abstractmethod
    def _what_was_read(self) -> str: ...

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types; NaN becomes None."""
        return without_nan(vars(self))


@dataclass(frozen=True)
class VerificationResult(ReadingResult):
    """The result of a white-box reading; ``print`` shows it in three lines.

    Attributes:
        n_bits: bits of the key.
        n_matches: decided bits that equal the key's signature.
        n_erasures: bits that the gradient does not decide (exact ties), which count neither for nor against.
        bit_error_rate: share of decided bits that differ, in [0, 1]; NaN when no bit was decided.
        p_value: exact probability that an unmarked model matches as well, ``P[Bin(decided, 1/2) >=
            matches]``; NaN when no bit was decided.
        log10_p_value: base-10 logarithm of the p-value, which does not underflow.
        margin: smallest ``(2 b_j - 1) z_j``, in standard deviations of an unmarked model's z; NaN when no bit
            was decided.
        n_queries: number of images that were read.
        alpha: significance level of the verdict.
        verdict: ``"owned"`` (p <= alpha), ``"not_proven"``, or ``"inconclusive"`` (no bit could be decided,
            or the model does not classify the images as the target class, so that the figures are not those
            of the class's gradient).
        commitment: the key's public commitment.
        recognised: share of the natural images that the model classifies as the target class, in [0, 1]; NaN
            if it classified none.
        free_bits: bits of choice that the key's payload and purpose left to its maker
            (:func:`.payload.free_bits`); NaN if the key is not one of this package. p-value and verdict are
            valid for readers who know that the payload was not chosen after seeing a model. Others charge for
            it, as :func:`judge` does, and look at ``log10_charged_p_value``.
    """

    @property
    def reason(self) -> str:
        """Why the verdict is what it is, in words."""
        if self.verdict == "inconclusive":
            return why_inconclusive(self.recognised, "the gradient is all zero or not finite")
        if self.verdict == "owned":
            return f"p <= alpha = {self.alpha:g}{self._for_whom}"
        return f"p > alpha = {self.alpha:g}, {self._what_it_takes}"

    @property
    def _what_it_takes(self) -> str:
        n_decided = self.n_bits - self.n_erasures
        if n_decided < least_bits(alpha=self.alpha):
            return f"which {n_decided} bits can never reach: {least_bits(alpha=self.alpha)} would do"
        needed = next(k for k in range(n_decided + 1) if ownership_p_value(k, n_decided) <= self.alpha)
        return f"which takes {needed} of {n_decided} bits"

    @property
    def _what_was_read(self) -> str:
        return f"{self.n_queries} images read{recognised_in_words(self.recognised)}"


def three_lines(verdict: str, reason: str, bits: str, read: str) -> str:
    """Return the text that ``print`` shows of a result."""
    return f"{verdict.replace('_', ' ')}: {reason}\n{bits}\n{read}"


def why_inconclusive(recognised: float, undecided: str) -> str:
    """Return why nothing can be concluded.

    Args:
        recognised: share of the images that the model classifies as the target class.
        undecided: why no bit could be decided, if that is the reason.
    """
    if is_recognised(recognised):
        return f"no bit could be decided, because {undecided}"
    return (
        f"the model classifies only {recognised:.0%} of the images as the target class; do they belong to "
        "it, are they raw in [0, 1], and do the key's `input_mean` and `input_std` fit the model?"
    )


def bits_in_words(n_matches: int, n_bits: int, n_erasures: int, log10_p_value: float) -> str:
    """Return bits and p-value in words; p may be smaller than the smallest float."""
    if n_erasures == n_bits:
        return f"none of {n_bits} bits decided"
    erased = f" ({n_erasures} of {n_bits} undecided)" if n_erasures else ""
    p_value = f"10^{log10_p_value:.1f}" if log10_p_value < -_MOST_DIGITS else f"{10**log10_p_value:.2g}"
    return f"{n_matches} of {n_bits - n_erasures} bits match{erased}, p = {p_value}"


def recognised_in_words(recognised: float) -> str:
    """Return the share of recognised images in words, to follow what was read; empty if it is not known."""
    if math.isnan(recognised):
        return ""
    return f", {recognised:.0%} of the natural ones classified as the target class"


def without_nan(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result's fields as JSON types; NaN becomes None."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in fields.items()
    }


def decide(
    projections: Tensor, key: SignatureKey, *, n_queries: int, alpha: float, recognised: float = math.nan
) -> VerificationResult:
    """Compare projections with the key's signature.

    Args:
        projections: z, shape ``(N,)``; an exact zero is an erasure, and one non-finite value makes all bits
            erasures.
        key: the owner's key.
        n_queries: number of images that the model was queried with.
        alpha: significance level, above 0 and at most 1.
        recognised: share of the images that the model classifies as the target class; NaN if not known.
    """
    check_alpha(alpha)
    signed = signed_by(readable(projections.detach().cpu().double()), key.signature).numpy()
    return VerificationResult.of(signed, key, n_queries=n_queries, alpha=alpha, recognised=recognised)


def check_alpha(alpha: float) -> None:
    """Refuse a significance level outside (0, 1]."""
    if check_number("alpha", alpha, minimum=0, maximum=1) == 0:
        raise ValueError("`alpha` must be > 0, got 0.")


def verdict_of(p_value: float, alpha: float, recognised: float = math.nan) -> Verdict:
    """Return the verdict.

    Args:
        p_value: p-value; NaN when no bit was decided.
        alpha: significance level.
        recognised: share of the images that the model classifies as the target class; NaN if not known.
    """
    if math.isnan(p_value) or not is_recognised(recognised):
        return "inconclusive"
    return "owned" if p_value <= alpha else "not_proven"


def is_recognised(share: float) -> bool:
    """Return whether enough of the images are recognised; true for NaN, an unknown share."""
    return not share < LEAST_RECOGNISED
