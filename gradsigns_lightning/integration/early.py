"""Early warnings of a fit that will leave the model unsigned.

Each is given once, and no check reads from the device in every step.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

from gradsigns_lightning.core.watermarker import Watermarker
from gradsigns_lightning.integration.advice import why_diverged, why_idle
from gradsigns_lightning.integration.length import FitLength
from gradsigns_lightning.integration.pace import LEAST_STEPS, own_margins, pace_of, too_slow
from gradsigns_lightning.integration.undeclared import is_dev_run

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_EVERY = 200  # batches, within an epoch that is longer
_FEWEST, _FEWEST_STEPS = 10, 3  # batches and optimizer steps below which nothing can be said
_RISES = 3  # readings in a row that are worse than the one before


class EarlyWarnings:
    """Warns early of what will leave the model unsigned.

    Checks at the end of each epoch, every 200 batches, and at half of the steps or the time, until every
    warning has been given or ruled out.

    Args:
        marker: the watermarker.
        name: the callback's.
    """

    def __init__(self, marker: Watermarker, name: str) -> None:
        self._marker = marker
        self._name = name
        self.start()

    def start(self) -> None:
        """Forget the last fit."""
        self._length = FitLength()
        self._n_due = 0  # batches since the schedule's start
        self._idle_known = self._pace_known = self._worse_known = self._half_known = self._has_diverged = (
            False
        )
        self._validated = False
        self._wrong: list[int] = []

    @property
    def n_batches(self) -> int:
        """Batches of this fit."""
        return self._length.n_batches

    def after_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count a batch of training."""
        self._length.after_batch(trainer)
        if self._marker.schedule.strength == 0 or trainer.current_epoch < self._marker.schedule.start_epoch:
            return
        self._n_due += 1
        if self._n_due % _EVERY == 0:
            self._check(trainer, pl_module)
        elif not self._half_known and self._n_due >= _FEWEST and self._length.is_half_over(trainer):
            self._half_known = True
            self._check(trainer, pl_module)

    def after_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what was embedded."""
        self._length.after_epoch()
        if self._n_due >= _FEWEST:
            self._check(trainer, pl_module)

    def after_reading(self, trainer: Trainer, margins: list[float] | None) -> None:
        """Compare a reading on held-out images with those before."""
        if margins is not None and trainer.state.fn == "fit":
            self._validated = True
            self._compare(trainer, margins, "readings")

    def _compare(self, trainer: Trainer, margins: list[float], readings: str) -> None:
        marker, now = self._marker, {"step": trainer.global_step, "epoch": trainer.current_epoch}
        if (
            self._worse_known
            or marker.state.n_embedded == 0
            or marker.strength_at(**now) != marker.schedule.strength
        ):
            return
        self._wrong = [*self._wrong[-_RISES:], sum(margin < 0 for margin in margins)]
        if len(self._wrong) > _RISES and all(
            a < b for a, b in zip(self._wrong, self._wrong[1:], strict=False)
        ):
            self._worse_known = True
            self._warn(
                trainer,
                "the bits are getting worse while the strength is constant: "
                f"{', '.join(map(str, self._wrong))} of {len(margins)} were wrong in the last {readings}. A "
                "lower learning rate or a higher `strength` holds them; pruning and adversarial training "
                "cost bits.",
            )

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        marker, automatic = self._marker, pl_module.automatic_optimization
        if (
            marker.schedule.strength == 0
            or is_dev_run(trainer)
            or (automatic and trainer.global_step < _FEWEST_STEPS)
        ):
            return
        if self._has_diverged:
            return
        if problem := why_diverged(pl_module):
            self._has_diverged = True
            self._warn(trainer, f"after {self._n_due} batches: {problem}")
            return
        if not self._idle_known:
            self._idle_known = True
            if problem := why_idle(trainer, marker, automatic=automatic):
                self._warn(trainer, f"after {self._n_due} batches: {problem}")
        if marker.state.n_embedded < LEAST_STEPS:
            return
        n_steps = self._length.n_steps(trainer, automatic=automatic)
        if not self._pace_known and math.isfinite(n_steps) and pace_of(marker) is not None:
            self._pace_known = True
            if problem := too_slow(trainer, marker, n_steps=n_steps):
                self._warn(trainer, problem)
        if not (self._validated or self._worse_known) and (margins := own_margins(marker)) is not None:
            self._compare(trainer, margins.tolist(), "checks on the training images")

    def _warn(self, trainer: Trainer, problem: str) -> None:
        if trainer.is_global_zero:
            warnings.warn(f"GradSigns {self._name!r}: {problem}", UserWarning, stacklevel=2)
