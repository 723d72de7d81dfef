"""How fast a mark comes, and whether a fit is long enough for it."""

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

HOPELESS = 10.0  # times the embedding steps: beyond, an estimate says nothing
LEAST_STEPS = 16  # that a pace is judged by
_LOST = 0.55  # root mean square of how far margins fall where the gradient is another after each step


@dataclass(frozen=True)
class Pace:
    """How fast the bit that decides the verdict comes.

    Attributes:
        n_steps: embedding steps that were made.
        needed: embedding steps after which it is held, if it goes on like this; infinite if it does not come
            nearer.
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
    """Return the margins in the training images' own gradient, on the host; None if no image of the class came by."""
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
    # The margins approach what the objective asks for like a decay, the slower the nearer.
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
    """Return the margin of the bit whose sign decides the verdict, when the others come in order of their margins."""
    return float(margins.sort(descending=True).values[least_matches(len(margins)) - 1])


def too_slow(trainer: Trainer, marker: Watermarker, *, n_steps: float) -> str | None:
    """Return that a fit of ``n_steps`` optimizer steps will be over before the mark is there, and what helps; None if not."""
    pace = pace_of(marker)
    if pace is None or not math.isfinite(n_steps):
        return None
    wanted = min(pace.needed, HOPELESS * pace.n_steps) - pace.n_steps
    to_come = sum(1 for step in islice(marker.coming_steps(), math.ceil(wanted)) if step < n_steps)
    if to_come >= wanted:
        return None
    total = marker.state.n_embedded + to_come
    factor = min(pace.needed, HOPELESS * total) / total
    return f"the fit will be over, after {total} embedding steps, before the mark is there. {cure(trainer, marker, pace, factor)}"


def cure(trainer: Trainer, marker: Watermarker, pace: Pace, factor: float) -> str:
    """Return what helps a mark that needs ``factor`` times as many embedding steps."""
    if pace.lost > _LOST:
        return (
            f"In {pace.n_steps} embedding steps bits were lost as fast as others came: the learning rate is "
            f"too high, or the "
            "`strength` too low."
        )
    if factor >= HOPELESS:
        return (
            f"In {pace.n_steps} embedding steps the bits hardly came nearer: take a learning rate that is at "
            f"least {HOPELESS:g} "
            "times as high."
        )
    end = next(
        islice(marker.coming_steps(), max(math.ceil(pace.needed) - pace.n_steps - 1, 0), None),
        trainer.global_step,
    )
    return (
        f"At the pace of the {pace.n_steps} embedding steps so far the mark takes about "
        f"{math.ceil(pace.needed)}, which come in "
        f"{end} optimizer steps: train that long, or with a learning rate that is at least "
        f"{max(factor, 1.1):.2g} times as high."
    )
