"""What was measured, as plain records that are written as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from gradsigns_lightning.core.result import count_bits, readable, verdict_of

MOST_ACCURACY_LOST = 0.05  # of the Watermark-Robustness-Toolbox (Lukas et al., IEEE S&P 2022)


@dataclass(frozen=True)
class Reading:
    """What was read of a mark.

    Attributes:
        n_bits: bits of the mark that were read.
        n_matches: decided bits that equal the owner's.
        n_erasures: bits that were not decided.
        log10_p_value: base-10 logarithm of the p-value; NaN if no bit was decided.
        w: weighted agreement ``sum_j s_j z_j / sqrt(sum_j z_j^2)``, ``s_j = 2 b_j - 1``, about standard
            normal for a model that is not signed with the key; NaN where only hard bits are known.
        verdict: ``"owned"``, ``"not_proven"`` or ``"inconclusive"``.
        n_queries: images that the model was queried with.
        own_p_value: p-value by the test of the scheme's own paper; NaN where it has none.
    """

    n_bits: int
    n_matches: int
    n_erasures: int
    log10_p_value: float
    w: float
    verdict: str
    n_queries: int
    own_p_value: float = math.nan

    @property
    def proven(self) -> bool:
        """Whether the mark is proven."""
        return self.verdict == "owned"


@dataclass(frozen=True)
class Point:
    """A model on the way of an attack.

    Attributes:
        dose: how much of the attack it has had, in the attack's own unit (epochs, share of weights, ...); 0
            before.
        accuracy: on the test images, in [0, 1].
        reading: what was read of the mark.
    """

    dose: float
    accuracy: float
    reading: Reading


@dataclass(frozen=True)
class AttackRecord:
    """What one attack did to one model.

    Attributes:
        attack: name of the attack's class.
        settings: its settings.
        kind: ``"model"``, or ``"responses"`` if the thief changes what goes into or comes out of an API.
        before: the stolen model.
        after: what the attack returned.
        curve: models on the way, by ascending dose; may be empty.
        seconds: what the attack took, without the measurements on the way.
        n_images: images that the thief had.
        recipe: how the thief trained.
    """

    attack: str
    settings: dict[str, Any]
    kind: str
    before: Point
    after: Point
    curve: tuple[Point, ...]
    seconds: float
    n_images: int
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy_lost(self) -> float:
        """Accuracy before minus accuracy after, a share."""
        return self.before.accuracy - self.after.accuracy

    @property
    def wins(self) -> bool:
        """Whether the mark was proven and is no longer, for less than five points of accuracy."""
        removed = self.before.reading.proven and not self.after.reading.proven
        return removed and self.accuracy_lost < MOST_ACCURACY_LOST

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types, NaN as None, with ``accuracy_lost`` and ``wins``."""
        found: dict[str, Any] = without_nan(asdict(self))
        return {**found, "accuracy_lost": self.accuracy_lost, "wins": self.wins}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AttackRecord:
        """Read what :meth:`to_dict` gave."""
        own = {name: value for name, value in values.items() if name not in ("accuracy_lost", "wins")}
        points = {name: _point(own[name]) for name in ("before", "after")}
        return cls(**{**own, **points, "curve": tuple(_point(one) for one in own["curve"])})


def bits_reading(signed: Tensor, *, n_queries: int, alpha: float, w: float) -> Reading:
    """Return what values for each bit say, which are positive where they agree with the owner's.

    Args:
        signed: shape ``(n,)``; exact zeros are erasures, and all are where one is not finite.
        n_queries: images that the model was queried with.
        alpha: significance level of the verdict.
        w: weighted agreement.
    """
    counts = count_bits(readable(signed))
    log10_p = counts.log10_p_value
    verdict = verdict_of(10**log10_p, alpha)
    return Reading(counts.n_bits, counts.n_matches, counts.n_erasures, log10_p, w, verdict, n_queries)


def counted_reading(n_matches: int, n: int, *, chance: float, alpha: float) -> Reading:
    """Return what matches of ``n`` queries say, each of which matches by chance with that probability."""
    log10_p = log10_binomial_tail(n_matches, n, chance)
    return Reading(n, n_matches, 0, log10_p, math.nan, verdict_of(10**log10_p, alpha), n)


def log10_binomial_tail(n_matches: int, n: int, chance: float) -> float:
    """Return the base-10 logarithm of ``P[Bin(n, chance) >= n_matches]``, summed in logarithms."""
    terms = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        + k * math.log(chance) + (n - k) * math.log1p(-chance)
        for k in range(n_matches, n + 1)
    ]  # fmt: skip
    largest = max(terms)
    return min(0.0, (largest + math.log(sum(math.exp(term - largest) for term in terms))) / math.log(10))


def without_nan(value: Any) -> Any:
    """Return nested plain values with None for each NaN, which JSON has no word for."""
    if isinstance(value, dict):
        return {name: without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _point(values: dict[str, Any]) -> Point:
    reading: dict[str, Any] = {
        name: math.nan if value is None else value for name, value in values["reading"].items()
    }
    return Point(values["dose"], values["accuracy"], Reading(**reading))
