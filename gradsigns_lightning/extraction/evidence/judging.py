"""What a third party does with an evidence bundle: derive everything again, replay, and read with images of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from torch import Tensor, nn

from gradsigns_lightning.core.checks import check_instance, check_number
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.payload import freedom
from gradsigns_lightning.extraction.asking import Oracle
from gradsigns_lightning.extraction.black_box import replay, verify_api
from gradsigns_lightning.extraction.evidence.bundle import Bundle
from gradsigns_lightning.extraction.evidence.commitment import check_timestamp
from gradsigns_lightning.extraction.result import DEFAULT_ALPHA, Verdict, VerificationResult, check_alpha, verdict_of, without_nan
from gradsigns_lightning.extraction.white_box import verify

GRINDING_BITS = 64.0
_CONTROL_ALPHA = 1e-3  # for all controls together
_SMALLEST_ALPHA = 1e-290


@dataclass(frozen=True)
class Judgement:
    """What the judge found.

    Attributes:
        owner: the claimant, as the key names it.
        commitment: public commitment of the opened key.
        committed_at: when the time-stamp authority saw the commitment, in UTC; None without time-stamp, or
            without authority to check it by.
        precedes_suspect: whether that was before the suspect was there; None if the judge did not say since when it is.
        reading: the judge's own reading of the suspect, or None.
        transcript: the claimant's reading, replayed from the bundle; its answers are what the claimant says they were. Or None.
        controls: reading of each control model with the same key and images.
        payload_bits: bits of choice that the key's payload left to its maker.
        grinding_bits: base-2 logarithm of the secrets that the claimant is thought able to have tried.
        p_value: raw p-value of the judge's reading, or of the transcript where there is no suspect to read.
        log10_p_value: its base-10 logarithm.
        adjusted_p_value: ``p_value`` times ``2 ** grinding_bits``, and times ``2 ** payload_bits`` unless the commitment is
            known to precede the suspect; at most 1.
        log10_adjusted_p_value: its base-10 logarithm.
        alpha: significance level of the verdict.
        verdict: ``"owned"`` if ``adjusted_p_value <= alpha`` and nothing in ``objections``.
        objections: what speaks against the claim, in words.
    """

    owner: str
    commitment: str
    committed_at: datetime | None
    precedes_suspect: bool | None
    reading: VerificationResult | None
    transcript: VerificationResult | None
    controls: Mapping[str, VerificationResult]
    payload_bits: float
    grinding_bits: float
    p_value: float
    log10_p_value: float
    adjusted_p_value: float
    log10_adjusted_p_value: float
    alpha: float
    verdict: Verdict
    objections: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types; NaN becomes None."""
        results = {
            name: result.to_dict() if result else None for name in ("reading", "transcript") for result in [getattr(self, name)]
        }
        return {
            **without_nan(vars(self)),
            **results,
            "committed_at": self.committed_at.isoformat() if self.committed_at else None,
            "controls": {name: result.to_dict() for name, result in self.controls.items()},
            "objections": list(self.objections),
        }


def judge(
    bundle: Bundle,
    *,
    suspect: nn.Module | Oracle | None = None,
    images: Tensor | None = None,
    controls: Mapping[str, nn.Module | Oracle] | None = None,
    authority: bytes | None = None,
    suspect_since: datetime | None = None,
    grinding_bits: float = GRINDING_BITS,
    alpha: float = DEFAULT_ALPHA,
    max_queries: int = 5000,
) -> Judgement:
    """Judge a bundle.

    Carriers, projection and signature are derived from the opened secret; nothing else in the bundle can stand in for them. What
    was left to choose costs: ``2 ** grinding_bits`` secrets tried make the smallest p-value smaller by that factor, and a free
    payload is a signature chosen freely, bit by bit.

    Args:
        bundle: the evidence, as :meth:`Bundle.load` returns it.
        suspect: the model in dispute: a ``torch.nn.Module`` that returns logits, or what :func:`verify_api` can ask. Without it
            only the bundle's transcript is replayed.
        images: the judge's own natural images of the key's target class, raw in [0, 1], ``(n, C, H, W)``; 50 or more.
        controls: models that the claimant had no part in, by name. The key must not be found in them.
        authority: the time-stamp authority's certificates, PEM; without it time-stamps count for nothing.
        suspect_since: when the suspect is first known to have existed, with time zone. A key committed to later proves nothing.
        grinding_bits: see :class:`Judgement`, 0 or more.
        alpha: significance level of the verdict.
        max_queries: images that each suspect or control behind an API may be asked about.

    Raises:
        ValueError: the transcript or the time-stamp is not genuine, or an argument is out of range.
        TypeError: an argument has the wrong type.
    """
    check_instance("bundle", bundle, Bundle)
    check_number("grinding_bits", grinding_bits, minimum=0)
    check_alpha(alpha)
    since = _aware(suspect_since) if suspect_since is not None else None
    controls = controls or {}
    if images is None and (suspect is not None or controls):
        raise ValueError("`images` must be given to read a suspect or controls: the judge's own, of the key's target class.")
    key = bundle.key
    committed_at = check_timestamp(bundle.timestamp, bundle.statement, authority) if bundle.timestamp and authority else None
    precedes = None if since is None else committed_at is not None and committed_at < since
    payload_bits = freedom(bytes.fromhex(key.reveal()["payload"]), key.n_bits)
    factor = (grinding_bits + (0.0 if precedes else payload_bits)) * math.log10(2)

    transcript = (
        replay(key, bundle.images, bundle.transcript) if bundle.images is not None and bundle.transcript is not None else None
    )
    reading = None
    if suspect is not None and images is not None:
        needed = max(_SMALLEST_ALPHA, 10 ** max(-300.0, math.log10(alpha) - factor))
        reading = _read(suspect, key, images, needed, max_queries)
    evidence = reading or transcript
    if evidence is None:
        raise ValueError("`suspect` must be given: the bundle holds no transcript that could be replayed.")
    readings = {}
    for name, model in controls.items():
        assert images is not None
        readings[name] = _read(model, key, images, _CONTROL_ALPHA / len(controls), max_queries)
    objections = _objections(precedes, readings)
    adjusted = evidence.log10_p_value + factor
    adjusted = 0.0 if adjusted > 0 else adjusted  # NaN stays: nothing could be decided
    verdict = verdict_of(10**adjusted, alpha)
    return Judgement(
        owner=key.owner,
        commitment=key.commitment,
        committed_at=committed_at,
        precedes_suspect=precedes,
        reading=reading,
        transcript=transcript,
        controls=readings,
        payload_bits=payload_bits,
        grinding_bits=float(grinding_bits),
        p_value=evidence.p_value,
        log10_p_value=evidence.log10_p_value,
        adjusted_p_value=10**adjusted,
        log10_adjusted_p_value=adjusted,
        alpha=alpha,
        verdict="not_proven" if objections and verdict == "owned" else verdict,
        objections=objections,
    )


def _objections(precedes: bool | None, controls: Mapping[str, VerificationResult]) -> tuple[str, ...]:
    found = []
    if precedes is False:
        found.append("the commitment is not known to be older than the suspect")
    for name, result in controls.items():
        if result.p_value <= _CONTROL_ALPHA / len(controls):
            found.append(f"control model {name!r} shows the signature too (p = {result.p_value:.2g})")
    return tuple(found)


def _read(model: nn.Module | Oracle, key: WatermarkKey, images: Tensor, alpha: float, max_queries: int) -> VerificationResult:
    if isinstance(model, nn.Module):
        return verify(model, key, images, alpha=alpha)
    return verify_api(model, key, images, alpha=alpha, max_queries=max_queries)


def _aware(time: datetime) -> datetime:
    check_instance("suspect_since", time, datetime)
    if time.tzinfo is None:
        raise ValueError(f"`suspect_since` must have a time zone, got {time.isoformat()}.")
    return time.astimezone(timezone.utc)
