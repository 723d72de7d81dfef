"""How fast a mark is embedded, and whether a fit is long enough for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from torch import Tensor

from gradsigns_lightning.core.key.reach import least_matches
from gradsigns_lightning.core.watermarker import Watermarker

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

HOPELESS = 10.0  # times the embedding steps made; an estimate beyond that says nothing
LEAST_STEPS = 16  # embedding steps that an estimate needs
_LOST = 0.55  # root mean square by which margins fall where each step changes the gradient altogether


@dataclass(frozen=True)
class Pace:
    """How fast the bit that decides the verdict is won.

    Attributes:
        n_steps: embedding steps that were made.
        needed: embedding steps after which that bit is held at this pace; infinite if it makes no progress.
        lost: root mean square of how far margins fell from the first embedding step to the last.
    """

    n_steps: int
    needed: float
    lost: float

    @property
    def factor(self) -> float:
        """How many times as many embedding steps are needed."""
        return self.needed / self.n_steps


def own_margins(marker: Watermarker) -> Tensor | None:
    """Return the margins in the gradient of the training images, on the host.

    None if no image of the class was seen.
    """
    if marker.state.margins is None or bool(marker.state.margins.isnan().any()):
        return None
    return marker.state.margins.float().cpu()


def pace_of(marker: Watermarker) -> Pace | None:
    """Return the pace of this fit; None if there were too few embedding steps to tell."""
    if (
        marker.state.n_embedded < LEAST_STEPS
        or marker.state.first_margins is None
        or (now := own_margins(marker)) is None
    ):
        return None
    first, aim = marker.state.first_margins.float().cpu(), getattr(marker.objective, "margin", 1.0)
    # Margins approach the objective's like an exponential decay: the nearer, the slower.
    before, after = (aim - _deciding(margins) for margins in (first, now))
    lost = float((first - now).relu().square().mean().sqrt())
    if after <= aim:
        return Pace(marker.state.n_embedded, marker.state.n_embedded, lost)
    if after >= before:
        return Pace(marker.state.n_embedded, math.inf, lost)
    return Pace(
        marker.state.n_embedded,
        marker.state.n_embedded * math.log(before / aim) / math.log(before / after),
        lost,
    )


def _deciding(margins: Tensor) -> float:
    """Return the margin of the bit that decides the verdict, if bits are won in order of their margins."""
    return float(margins.sort(descending=True).values[least_matches(len(margins)) - 1])


def too_slow(trainer: Trainer, marker: Watermarker, *, n_steps: float) -> str | None:
    """Return a warning if a fit of ``n_steps`` optimizer steps is too short for the mark, and what helps.

    None if it is long enough.
    """
    pace = pace_of(marker)
    if pace is None or not math.isfinite(n_steps):
        return None
    wanted = min(pace.needed, HOPELESS * pace.n_steps) - pace.n_steps
    to_come = sum(1 for step in islice(marker.coming_steps(), math.ceil(wanted)) if step < n_steps)
    if to_come >= wanted:
        return None
    total = marker.state.n_embedded + to_come
    factor = min(pace.needed, HOPELESS * total) / total
    return (
        f"the fit will be over, after {total} embedding steps, before the mark is embedded. "
        f"{cure(trainer, marker, pace, factor)}"
    )


def cure(trainer: Trainer, marker: Watermarker, pace: Pace, factor: float) -> str:
    """Return what helps a mark that needs ``factor`` times as many embedding steps."""
    if pace.lost > _LOST:
        return (
            f"In {pace.n_steps} embedding steps bits were lost as fast as others were won: the learning rate "
            "is too high, or the `strength` too low."
        )
    if factor >= HOPELESS:
        return (
            f"In {pace.n_steps} embedding steps the bits made hardly any progress: use a learning rate that "
            f"is at least {HOPELESS:g} times as high."
        )
    end = next(
        islice(marker.coming_steps(), max(math.ceil(pace.needed) - pace.n_steps - 1, 0), None),
        trainer.global_step,
    )
    return (
        f"At the pace of the {pace.n_steps} embedding steps so far the mark needs about "
        f"{math.ceil(pace.needed)}, which take {end} optimizer steps: train that long, or with a learning "
        f"rate that is at least {max(factor, 1.1):.2g} times as high."
    )
