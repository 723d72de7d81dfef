"""The state of embedding from one step to the next, and when it embeds next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from gradsigns_lightning.core.dose import MISSING, SAFE, OwnLength, TaskGradient
from gradsigns_lightning.core.result import is_readable
from gradsigns_lightning.core.schedule import Cadence
from gradsigns_lightning.core.turns import Turns

_AMPLE = 0.7  # in units of z: about three times its noise in a reading of 50 images


@dataclass(frozen=True, eq=False)
class EmbeddingState:
    """The immutable state of embedding; each step makes a new one.

    To roll back a step is to keep the old state, and a checkpoint holds the first five fields. All tensors
    are detached; those of the last embedding step stay on its device and are not read to the host, so that
    training does not wait for them.

    Attributes:
        first_step: first optimizer step that embedded.
        last_step: last optimizer step that embedded.
        factor: how much longer the interval is than usual.
        task_gradient: length of the task's gradient.
        mean_gradient: smoothed mean gradient, over the whole input so that a saved one does not reveal the
            carriers.
        n_embedded: number of embedding steps.
        n_non_finite: how many of them had non-finite gradients.
        n_held_back: how many of them gave less than was needed, because the network did not know the class.
        findings: whether the last step found that a bit was missing, that all were safe, and that nothing
            needed to be embedded, shape ``(3,)``; None once the factor has been updated.
        share: smallest margin in the last step, relative to the objective's margin.
        margins: ``(2 b_j - 1) z_j`` of the mean gradient in the last step that had one.
        first_margins: the same in the first such step.
        value: value of the objective in the last step.
        recognised: mean probability of the target class for its images in the last step.
        own_length: length of the objective's own gradient, if parameters are sharded.
        turns: which optimizers step in the batches that embed.
    """

    first_step: int | None = None
    last_step: int | None = None
    factor: float = 1.0
    task_gradient: TaskGradient = field(default_factory=TaskGradient)
    mean_gradient: Tensor | None = None
    n_embedded: int = 0
    n_non_finite: Tensor | int = 0
    n_held_back: Tensor | int = 0
    findings: Tensor | None = None
    share: Tensor | None = None
    margins: Tensor | None = None
    first_margins: Tensor | None = None
    value: Tensor | None = None
    recognised: Tensor | None = None
    own_length: OwnLength = field(default_factory=OwnLength)
    turns: Turns = field(default_factory=Turns)

    def starting_at(self, step: int) -> EmbeddingState:
        """Return the state in which optimizer step ``step`` embeds."""
        return replace(self, first_step=step if self.first_step is None else self.first_step, last_step=step)

    def settled(self, cadence: Cadence) -> EmbeddingState:
        """Return the state with the factor updated by the last step's findings; waits for the device."""
        if self.findings is None:
            return self
        missing, safe, satisfied = self.findings.tolist()
        factor = cadence.next_factor(self.factor, missing=missing, safe=safe, satisfied=satisfied)
        return replace(self, factor=factor, findings=None)

    def interval(self, cadence: Cadence, factor: float | None = None) -> int:
        """Return the interval after the last embedding step; ``factor`` replaces the state's if given."""
        assert self.first_step is not None
        assert self.last_step is not None
        return cadence.interval(self.last_step - self.first_step, self.factor if factor is None else factor)

    def earliest(self, cadence: Cadence) -> int:
        """Return the first step that may embed, whatever the last step's findings are."""
        assert self.last_step is not None
        hurried = None if self.findings is None else _hurried(cadence, self.factor)
        return self.last_step + self.turns.interval(self.interval(cadence, hurried), self.n_embedded)

    def is_near(self, step: int, cadence: Cadence) -> bool:
        """Return whether the next embedding step is so near that images and gradients are to be observed."""
        if self.last_step is None:
            return True
        earliest = self.earliest(cadence)
        return step >= earliest - max((earliest - self.last_step) // 10, 5)

    def is_due(self, step: int, cadence: Cadence) -> bool:
        """Return whether the interval is over."""
        if self.last_step is None:
            return True
        # Nothing is read from the device as long as no finding could make the step due.
        return step >= self.earliest(cadence) and step >= self.settled(cadence).earliest(cadence)

    def coming_steps(self, cadence: Cadence) -> Iterator[int]:
        """Yield the steps that will embed if bits stay missing; none before the first embedding step."""
        if self.first_step is None or self.last_step is None:
            return
        step, factor = self.last_step, self.factor
        for n_embedded in count(self.n_embedded):
            factor = _hurried(cadence, factor)
            interval = self.turns.interval(cadence.interval(step - self.first_step, factor), n_embedded)
            step += self.turns.whole_batches(interval)
            yield step

    def having_found(self, margins: Tensor, *, asked: float, satisfied: Tensor) -> EmbeddingState:
        """Return the state with the findings from the margins of an embedding step.

        Args:
            margins: ``(2 b_j - 1) z_j``; zero without an image, NaN in a step that overflowed.
            asked: margin that the objective asks for.
            satisfied: whether the objective is satisfied, a scalar bool.
        """
        usable = is_readable(margins)
        none = torch.full_like(margins, torch.nan)
        first, last = (
            none if known is None else known.to(margins) for known in (self.first_margins, self.margins)
        )
        now, share = torch.where(usable, margins, last), margins.min() / asked
        return replace(
            self,
            findings=torch.stack([share < MISSING, share >= SAFE, (margins.min() >= _AMPLE) | satisfied]),
            share=share,
            margins=now,
            first_margins=torch.where(first.isnan(), now, first),
        )

    def having_embedded(self, loss: Tensor, *, is_held_back: Tensor | bool) -> EmbeddingState:
        """Return the state after an embedding step.

        Args:
            loss: the embedding loss, a scalar; NaN if gradients were non-finite.
            is_held_back: the step gave less than was needed.
        """
        return replace(
            self,
            n_embedded=self.n_embedded + 1,
            n_non_finite=self.n_non_finite + loss.isnan(),
            n_held_back=self.n_held_back + is_held_back,
            turns=self.turns.marking(),
        )

    def smoothing(self, mean: Tensor, momentum: float) -> tuple[Tensor, EmbeddingState]:
        """Return the smoothed mean gradient, and the state after it.

        The derivative of the smoothed gradient is that of this step's mean.

        Args:
            mean: mean gradient of this step.
            momentum: weight of the earlier steps in the smoothed gradient.
        """
        if momentum == 0:
            return mean, self
        new = mean.detach()
        previous = None if self.mean_gradient is None else self.mean_gradient.to(mean)
        smoothed = new if previous is None else momentum * previous + (1 - momentum) * new
        # One step that overflowed must not make all later ones non-finite.
        kept = torch.where(
            new.isfinite().all(), smoothed, torch.zeros_like(new) if previous is None else previous
        )
        return smoothed + (mean - new), replace(self, mean_gradient=kept)

    def to_checkpoint(self, cadence: Cadence) -> dict[str, Any]:
        """Return what a checkpoint holds: plain types and one tensor that reveals nothing of the key."""
        settled = self.settled(cadence)
        return {
            "first_step": settled.first_step,
            "last_step": settled.last_step,
            "factor": settled.factor,
            "task_gradient": settled.task_gradient.state_dict(),
            "mean_gradient": None if settled.mean_gradient is None else settled.mean_gradient.cpu(),
        }

    def from_checkpoint(self, saved: dict[str, Any]) -> EmbeddingState:
        """Return the state restored from what :meth:`to_checkpoint` returned.

        From a checkpoint of a release in which the cadence had no factor only the steps are taken: its
        interval followed another rule, and its mean was over gradients that did not have unit length.
        """
        is_former = "factor" not in saved
        return replace(
            self,
            first_step=saved["first_step"],
            last_step=saved["last_step"],
            factor=1.0 if is_former else saved["factor"],
            task_gradient=TaskGradient.from_state_dict({} if is_former else saved["task_gradient"]),
            mean_gradient=None if is_former else saved["mean_gradient"],
            findings=None,
        )


def _hurried(cadence: Cadence, factor: float) -> float:
    return cadence.next_factor(factor, missing=True, safe=False, satisfied=False)
