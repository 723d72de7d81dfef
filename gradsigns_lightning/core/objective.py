"""Embedding objectives: functions of the mean carrier gradient alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.key.checks import more_room
from gradsigns_lightning.core.signature import SignatureProjector
from gradsigns_lightning.core.utils.checks import check_choice, check_number


class Objective(Protocol):
    """Maps the mean gradient at the carriers to a scalar that is small when the bits are right.

    Attributes:
        of_directions: whether every image's gradient is brought to unit length before the mean is taken, as
            in reading.
    """

    of_directions: bool

    def __call__(self, carrier_gradient: Tensor, projector: SignatureProjector) -> Tensor:
        """Return the objective, a scalar, for a gradient of shape ``(c,)``."""
        ...

    def satisfied(self, carrier_gradient: Tensor, projector: SignatureProjector) -> Tensor:
        """Return whether nothing is left to embed, so that the cadence may back off; a scalar bool."""
        ...

    def check_key(self, key: WatermarkKey) -> None:
        """Raise a ``ValueError`` if ``key`` cannot be embedded with this objective."""
        ...


@dataclass(frozen=True)
class MarginObjective:
    """Hinge on the projections of the unit gradient.

    It is the root mean square over bits of ``max(0, margin - (2 b_j - 1) z_j)``. The root keeps the pull of
    the last missing bits: in a mean over N bits a single one weighs 1/N and may stay wrong for good. Reading
    thresholds z at 0, so the gradient's scale does not affect the bits; leaving it free keeps the cost to the
    task small.

    Args:
        margin: distance from 0 at which a bit counts as held, in standard deviations of an unmarked model's
            z; positive.
    """

    margin: float = 1.0
    of_directions = True

    def __post_init__(self) -> None:
        if check_number("margin", self.margin, minimum=0) == 0:
            raise ValueError("`margin` must be > 0, got 0.")

    def __call__(self, carrier_gradient: Tensor, projector: SignatureProjector) -> Tensor:
        """Return the objective, a scalar."""
        hinge = F.relu(self.margin - projector.signs * projector.project(carrier_gradient))
        mean_square = hinge.square().mean()
        # The root has no derivative at zero, where nothing is left to embed.
        return torch.where(mean_square > 0, mean_square, 1).sqrt() * (mean_square > 0)

    def satisfied(self, carrier_gradient: Tensor, projector: SignatureProjector) -> Tensor:
        """Return whether every bit is beyond the margin."""
        return (projector.signs * projector.project(carrier_gradient)).min() >= self.margin

    def check_key(self, key: WatermarkKey) -> None:
        """Refuse a margin that N rows on c carriers cannot reach.

        The shortest g with E g = margin * (2 b - 1) has an expected squared length of margin^2 * N / (c - N -
        1) (inverse Wishart), which must be below 1.
        """
        attainable = _attainable_margin(key)
        if self.margin > attainable:
            advice = (
                "Take more carriers or a smaller margin."
                if attainable
                else more_room(key.n_bits, math.prod(key.input_shape))
            )
            raise ValueError(
                f"`margin` must be at most sqrt((n_carriers - n_bits - 1) / n_bits) = {attainable:.3f} for "
                f"{key.n_bits} bits on {key.n_carriers} carriers, got {self.margin}. {advice}"
            )


@dataclass(frozen=True)
class PaperObjective:
    """Binary cross-entropy of sigmoid(E g), the published objective (GradSigns, MLSys 2021, section 3.2)."""

    of_directions = False

    def __call__(self, carrier_gradient: Tensor, projector: SignatureProjector) -> Tensor:
        """Return the objective, a scalar."""
        z = projector.projection @ carrier_gradient
        return F.binary_cross_entropy_with_logits(z, (projector.signs + 1) / 2)

    def satisfied(self, carrier_gradient: Tensor, projector: SignatureProjector) -> Tensor:
        """Return false: the cross-entropy is never satisfied."""
        return projector.signs.new_zeros(()).bool()

    def check_key(self, key: WatermarkKey) -> None:
        """Accept every key."""


def make_objective(objective: str | Objective, key: WatermarkKey) -> Objective:
    """Return the objective of that name, with a margin that ``key`` can reach, or the object itself."""
    if not isinstance(objective, str):
        return objective
    check_choice("objective", objective, ("margin", "paper"))
    if objective == "paper":
        return PaperObjective()
    # A key with few carriers per bit gets a smaller margin, which leaves room for what the task needs; a key
    # that leaves no room is refused.
    attainable = _attainable_margin(key)
    return MarginObjective(min(1.0, 0.7 * attainable) if attainable else 1.0)


def _attainable_margin(key: WatermarkKey) -> float:
    room = key.n_carriers - key.n_bits - 1
    return math.sqrt(room / key.n_bits) if room > 0 else 0.0
