"""Estimates how long a fit will be: by epochs, steps or time, whichever ends first."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gradsigns_lightning.integration.undeclared import callbacks_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class FitLength:
    """Length of a fit, extrapolated from the batches so far where Lightning does not know it.

    Lightning counts the steps of automatic optimization with loaders that have a length, but not those of
    manual optimization, of a loader without a length, or under a time limit.
    """

    def __init__(self) -> None:
        self.n_batches = 0
        self._n_epochs = self._n_batches_then = 0  # epochs that ended, and batches in them
        # time, optimizer steps and epoch after the first batch, which may take much longer
        self._first = (0.0, 0, 0)

    def after_batch(self, trainer: Trainer) -> None:
        """Count a batch of training."""
        self.n_batches += 1
        if self.n_batches == 1:
            self._first = (time.monotonic(), trainer.global_step, trainer.current_epoch)

    def after_epoch(self) -> None:
        """Count an epoch."""
        self._n_epochs, self._n_batches_then = self._n_epochs + 1, self.n_batches

    def n_steps(self, trainer: Trainer, *, automatic: bool) -> float:
        """Return after how many optimizer steps the fit will end; infinite if that is not known yet."""
        return min(
            [
                math.inf,
                *self._by_steps(trainer),
                *self._by_time(trainer),
                *self._by_epochs(trainer, automatic),
            ]
        )

    def is_half_over(self, trainer: Trainer) -> bool:
        """Return whether half of the steps or of the time is over, where they are limited."""
        ends = [*self._by_steps(trainer), *self._by_time(trainer)]
        return any(trainer.global_step >= end / 2 for end in ends)

    def _by_steps(self, trainer: Trainer) -> Iterator[float]:
        if trainer.max_steps != -1:
            yield float(trainer.max_steps)

    def _by_time(self, trainer: Trainer) -> Iterator[float]:
        began, first_step, _ = self._first
        steps, seconds = trainer.global_step - first_step, time.monotonic() - began
        timers = [c for c in callbacks_of(trainer) if "Timer" in (kind.__name__ for kind in type(c).__mro__)]
        for timer in timers if steps > 0 and seconds > 0 else []:
            remaining = getattr(timer, "time_remaining", lambda: None)()
            if remaining is not None:
                yield trainer.global_step + steps / seconds * max(remaining, 0.0)

    def _by_epochs(self, trainer: Trainer, automatic: bool) -> Iterator[float]:
        has_length = math.isfinite(trainer.num_training_batches)
        if trainer.max_epochs in (None, -1):
            return
        if automatic and has_length:
            yield float(trainer.estimated_stepping_batches)
        elif self.n_batches > 1 and (has_length or self._n_epochs):
            an_epoch = trainer.num_training_batches if has_length else self._n_batches_then / self._n_epochs
            _, first_step, first_epoch = self._first
            steps_a_batch = (trainer.global_step - first_step) / (self.n_batches - 1)
            yield first_step + steps_a_batch * (an_epoch * (trainer.max_epochs - first_epoch) - 1)
