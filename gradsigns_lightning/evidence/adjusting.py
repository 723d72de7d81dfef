"""Adjusting p-values for everything that a claimant could have tried, and the verdict that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.key.payload import free_bits
from gradsigns_lightning.core.key.reach import USUAL_GRINDING_BITS
from gradsigns_lightning.core.result import ReadingResult, Verdict, is_recognised, verdict_of
from gradsigns_lightning.core.utils.text import printable
from gradsigns_lightning.evidence.commitment import Statement
from gradsigns_lightning.evidence.dating import Dating
from gradsigns_lightning.evidence.reading import Readings

GRINDING_BITS = USUAL_GRINDING_BITS
_SMALLEST_ALPHA = 1e-290


@dataclass(frozen=True)
class Charges:
    """The number of tries that a judge charges to the claimant.

    Attributes:
        n_commitments: commitments in the claimant's statement, each of which could have been opened instead.
        payload_bits: free bits of the key's payload, which its maker could choose.
        grinding_bits: base-2 logarithm of the number of secrets tried, at least that of ``n_commitments``.
    """

    n_commitments: int
    payload_bits: float
    grinding_bits: float

    @classmethod
    def of(cls, statement: Statement, key: WatermarkKey, grinding_bits: float) -> Charges:
        """Return the charges for a key of a statement, with at least ``grinding_bits`` for grinding."""
        n_commitments = len(set(statement.commitments))
        return cls(n_commitments, free_bits(key), max(float(grinding_bits), math.log2(n_commitments)))

    @property
    def log10_factor(self) -> float:
        """Base-10 logarithm of the number of tries, by which a p-value is multiplied."""
        return (self.grinding_bits + self.payload_bits) * math.log10(2)

    def alpha_left(self, alpha: float) -> float:
        """Return the level at which a reading must be significant to be so at ``alpha`` after the charges."""
        return max(_SMALLEST_ALPHA, 10 ** max(-300.0, math.log10(alpha) - self.log10_factor))

    def adjusted(self, log10_p_value: float) -> float:
        """Return the base-10 logarithm of the adjusted p-value, at most 0; NaN where no bit was decided."""
        adjusted = log10_p_value + self.log10_factor
        return 0.0 if adjusted > 0 else adjusted  # not `min`, which may turn NaN into 0


@dataclass(frozen=True)
class Finding:
    """The adjusted p-value and the verdict; see :class:`Judgement` for the attributes."""

    log10_adjusted_p_value: float
    verdict: Verdict | Literal["claimed"]
    objections: tuple[str, ...]
    remarks: tuple[str, ...]


def adjust(readings: Readings, charges: Charges, dating: Dating, *, alpha: float) -> Finding:
    """Apply the charges to the decisive reading, and decide at ``alpha``."""
    adjusted = charges.adjusted(readings.decisive.log10_p_value)
    objections = (*_objections_to_date(dating), *_objections_of_controls(readings))
    verdict = _verdict(readings.suspect, 10**adjusted, alpha, objections)
    return Finding(adjusted, verdict, objections, _remarks(readings))


def _verdict(
    reading: ReadingResult | None, adjusted_p_value: float, alpha: float, objections: Sequence[str]
) -> Verdict | Literal["claimed"]:
    if reading is None:
        return "claimed"
    verdict = verdict_of(adjusted_p_value, alpha, reading.recognised)
    return "not_proven" if objections and verdict == "owned" else verdict


def _objections_to_date(dating: Dating) -> list[str]:
    if dating.precedes_suspect is None:
        return ["no trusted time-stamp was compared with the date since when the suspect is known"]
    return [] if dating.precedes_suspect else ["the commitment is not known to be older than the suspect"]


def _objections_of_controls(readings: Readings) -> list[str]:
    return [
        f"control model {printable(name)!r} shows the signature too (p = {result.p_value:.2g})"
        for name, result in readings.controls.items()
        if result.p_value <= result.alpha
    ]


def _remarks(readings: Readings) -> tuple[str, ...]:
    own, controls = readings.suspect, readings.controls
    silent = [name for name, result in controls.items() if result.verdict == "inconclusive"]
    found = [
        f"control model {printable(name)!r} gives no usable answers, so it is not a control"
        for name in silent
    ]
    if own is not None and len(silent) == len(controls):
        found.append(
            "no control model of the same task was read, so whether the key fits any such model is not known"
        )
    if own is None:
        found.append(
            "the answers are what the claimant says they were; only a reading of the suspect can decide"
        )
    if not readings.as_announced:
        found.append(
            "the transcript was not read as the published commitment announced, so its p-value proves nothing"
        )
    if own is not None and not is_recognised(own.recognised):
        found.append(
            "the suspect does not classify the images as the key's class, read with normalization "
            f"{readings.key.input_mean}, {readings.key.input_std}, so its reading says nothing"
        )
    return tuple(found)
