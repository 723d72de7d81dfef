"""Judging an evidence bundle as a third party: derive everything again, replay, and read the suspect.

The steps are in :mod:`.dating`, :mod:`.reading` and :mod:`.adjusting`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from torch import Tensor, nn

from gradsigns_lightning.core.key.signature_key import KeyAsRead
from gradsigns_lightning.core.result import (
    DEFAULT_ALPHA,
    ReadingResult,
    Verdict,
    bits_in_words,
    check_alpha,
    recognised_in_words,
    three_lines,
    without_nan,
)
from gradsigns_lightning.core.utils.checks import check_instance, check_number
from gradsigns_lightning.core.utils.text import printable
from gradsigns_lightning.evidence.adjusting import GRINDING_BITS, Charges, adjust
from gradsigns_lightning.evidence.bundle import Bundle
from gradsigns_lightning.evidence.dating import Dating, date_statement
from gradsigns_lightning.evidence.reading import Readings, read_all
from gradsigns_lightning.verification.api.queries import Oracle
from gradsigns_lightning.verification.api.result import ApiVerificationResult


@dataclass(frozen=True)
class Judgement:
    """What the judge found; ``print`` shows it in three lines.

    Attributes:
        owner: the claimant's name in the key: foreign text, to be shown with :func:`printable`.
        commitment: public commitment of the opened key.
        signer: Ed25519 public key of the statement's signer, who signed the bundle.
        n_commitments: commitments in the claimant's statement, each of which could have been opened instead.
        committed_at: when the time-stamp authority saw the commitment, in UTC; None without a time-stamp, or
            without the authority's certificates.
        precedes_suspect: whether that was before the suspect existed; None if the judge did not say since
            when it is known.
        reading: the judge's own reading of the suspect, or None. Its p-value is not adjusted; its ``alpha``
            is what the charges leave of the judge's, so its ``free_bits`` are NaN, not charged twice.
        transcript: the claimant's reading, replayed from the bundle, or None. Its answers are what the
            claimant says they were.
        controls: reading of each control model with the same key and images. Their p-values are not adjusted:
            they count against the claim, and a charge would weaken them.
        payload_bits: free bits of the key's payload, which its maker could choose.
        grinding_bits: base-2 logarithm of the number of secrets that the claimant may have tried, at least
            that of ``n_commitments``.
        p_value: unadjusted p-value of the judge's reading, or of the transcript where there is no suspect to
            read.
        log10_p_value: base-10 logarithm of ``p_value``.
        adjusted_p_value: ``p_value`` times ``2 ** (grinding_bits + payload_bits)``, at most 1. A time-stamp
            does not reduce the charge: models of one task share much of their mean gradient, so a key can be
            fitted to another model before the suspect exists.
        log10_adjusted_p_value: base-10 logarithm of ``adjusted_p_value``.
        alpha: significance level of the verdict.
        verdict: ``"owned"`` if ``adjusted_p_value <= alpha`` and ``objections`` is empty; ``"not_proven"``;
            ``"inconclusive"`` if the reading decides nothing; ``"claimed"`` if there was no suspect to read,
            whatever the transcript says.
        objections: what counts against the claim or is missing from it, in words.
        remarks: what a reader should know, in words; remarks do not change the verdict.
    """

    owner: str
    commitment: str
    signer: str
    n_commitments: int
    committed_at: datetime | None
    precedes_suspect: bool | None
    reading: ReadingResult | None
    transcript: ApiVerificationResult | None
    controls: Mapping[str, ReadingResult]
    payload_bits: float
    grinding_bits: float
    p_value: float
    log10_p_value: float
    adjusted_p_value: float
    log10_adjusted_p_value: float
    alpha: float
    verdict: Verdict | Literal["claimed"]
    objections: tuple[str, ...]
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        """Return the verdict and why, bits and p-values, and what was read, a line each."""
        result = self.reading or self.transcript
        assert result is not None
        bits = bits_in_words(result.n_matches, result.n_bits, result.n_erasures, self.log10_p_value)
        adjusted = (
            f"10^{self.log10_adjusted_p_value:.1f} for 2^{self.grinding_bits + self.payload_bits:g} tries"
        )
        read = f"{result.n_queries} images queried{recognised_in_words(result.recognised)}"
        whose = "the judge's own reading" if self.reading else "the claimant's transcript"
        return three_lines(
            self.verdict, printable(self.reason), f"{bits}, adjusted {adjusted}", f"{whose}: {read}"
        )

    @property
    def reason(self) -> str:
        """Why the verdict is what it is, in words."""
        parts = list(self.objections)
        if self.verdict == "claimed":
            parts.insert(0, "there was no suspect to read")
        elif self.verdict == "inconclusive" and self.reading is not None:
            parts.insert(0, self.reading.reason)
        elif not self.log10_adjusted_p_value <= math.log10(self.alpha):
            parts.insert(0, f"adjusted p > alpha = {self.alpha:g}")
        return "; ".join(parts) or f"adjusted p <= alpha = {self.alpha:g}, and nothing speaks against it"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types; NaN becomes None."""
        return {
            **without_nan(vars(self)),
            "reading": self.reading.to_dict() if self.reading else None,
            "transcript": {**self.transcript.to_dict(), "verdict": "claimed"} if self.transcript else None,
            "committed_at": self.committed_at.isoformat() if self.committed_at else None,
            "controls": {name: result.to_dict() for name, result in self.controls.items()},
            "objections": list(self.objections),
            "remarks": list(self.remarks),
        }


def judge(
    bundle: Bundle,
    *,
    suspect: nn.Module | Oracle | None = None,
    images: Tensor | None = None,
    input_mean: float | Sequence[float] = 0.0,
    input_std: float | Sequence[float] = 1.0,
    controls: Mapping[str, nn.Module | Oracle] | None = None,
    authority: bytes | None = None,
    suspect_since: datetime | None = None,
    grinding_bits: float = GRINDING_BITS,
    alpha: float = DEFAULT_ALPHA,
    max_queries: int = 5000,
) -> Judgement:
    """Judge a bundle.

    Carriers, projection and signature are derived from the opened secret; nothing else in the bundle can
    replace them. The claimant's choices are charged for: trying ``2 ** grinding_bits`` secrets makes the
    smallest p-value smaller by that factor, and a free payload is a signature chosen bit by bit. All other
    choices are the judge's: images, normalization, estimator, budget and level. Only a key that was
    time-stamped before the suspect existed can be ``"owned"``.

    Args:
        bundle: the evidence, as :meth:`Bundle.load` returns it.
        suspect: the model in dispute: a ``torch.nn.Module`` that returns logits, or an oracle that
            :func:`verify_api` can query. Without it only the bundle's transcript is replayed, and the verdict
            is ``"claimed"``.
        images: the judge's own natural images of the key's target class, raw in [0, 1], ``(n, C, H, W)``; 50
            or more.
        input_mean: mean of the suspect's input normalization, as its own documentation states it, one value
            or one per channel; by default the suspect takes raw images. The key's own value is ignored.
        input_std: standard deviation of that normalization.
        controls: models that the claimant had no part in, under their names; they take raw images
            (:class:`RawInputs` wraps others). The key must not be found in them.
        authority: the time-stamp authority's certificates, PEM; without them a time-stamp counts for nothing.
        suspect_since: when the suspect is first known to have existed, with time zone. A key committed to
            later proves nothing.
        grinding_bits: see :class:`Judgement`, 0 or more.
        alpha: significance level of the verdict.
        max_queries: most images that may be sent to each suspect or control behind an API.

    Raises:
        ValueError: the transcript or the time-stamp is not genuine, or an argument is out of range.
        TypeError: an argument has the wrong type.
    """
    check_instance("bundle", bundle, Bundle)
    check_number("grinding_bits", grinding_bits, minimum=0)
    check_alpha(alpha)
    controls = controls or {}
    if images is None and (suspect is not None or controls):
        raise ValueError(
            "`images` must be given to read a suspect or controls: the judge's own, of the key's target "
            "class."
        )
    key = KeyAsRead.of(bundle.key, input_mean=input_mean, input_std=input_std)
    dating = date_statement(
        bundle.statement, bundle.timestamp, authority=authority, suspect_since=suspect_since
    )
    charges = Charges.of(bundle.statement, bundle.key, grinding_bits)
    level = charges.alpha_left(alpha)
    readings = read_all(
        bundle, key, suspect=suspect, controls=controls, images=images, alpha=level, max_queries=max_queries
    )
    return _judgement(bundle, dating, charges, readings, alpha)


def _judgement(
    bundle: Bundle, dating: Dating, charges: Charges, readings: Readings, alpha: float
) -> Judgement:
    finding, decisive = adjust(readings, charges, dating, alpha=alpha), readings.decisive
    return Judgement(
        owner=bundle.key.owner,
        commitment=readings.key.commitment,
        signer=bundle.statement.signer,
        n_commitments=charges.n_commitments,
        committed_at=dating.committed_at,
        precedes_suspect=dating.precedes_suspect,
        reading=readings.suspect,
        transcript=readings.transcript,
        controls=readings.controls,
        payload_bits=charges.payload_bits,
        grinding_bits=charges.grinding_bits,
        p_value=decisive.p_value,
        log10_p_value=decisive.log10_p_value,
        adjusted_p_value=10**finding.log10_adjusted_p_value,
        log10_adjusted_p_value=finding.log10_adjusted_p_value,
        alpha=alpha,
        verdict=finding.verdict,
        objections=finding.objections,
        remarks=finding.remarks,
    )
