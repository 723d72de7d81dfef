"""Matches embedding losses with optimizer steps.

Some optimizers evaluate the loss several times per step, and some modules skip the step.
"""

from __future__ import annotations

import weakref

from torch import Tensor

from gradsigns_lightning.core.watermarker import Watermarker


class Evaluations:
    """Ensures that every embedding loss becomes part of one optimizer step.

    Args:
        marker: the watermarker, which rolls back a step that was not made.
    """

    def __init__(self, marker: Watermarker) -> None:
        self._marker = marker
        self.start()

    def start(self) -> None:
        """Forget the last fit."""
        self._awaited: int | None = None  # embedding step whose gradient no optimizer has used yet
        self._last_seen: tuple[int, weakref.ref[Tensor]] | None = None

    def begin(self, images: Tensor, step: int, *, only: bool) -> None:
        """Roll back an embedding step that Lightning counted but the module's ``optimizer_step`` skipped.

        Args:
            images: images of the batch.
            step: the next optimizer step.
            only: whether the batch must be the only one of its step.

        Raises:
            ValueError: the only batch of a step comes a second time.
        """
        if self._awaited is not None and step > self._awaited:
            self.roll_back()
        if not only:
            return
        if self._last_seen is not None and self._last_seen[0] == step and self._last_seen[1]() is images:
            raise ValueError(
                "The optimizer evaluates the loss more than once a step (as SAM and LBFGS do), and the "
                "embedding loss is in the first evaluation only: use another optimizer, or manual "
                "optimization with GradSignsMixin, and add `watermark_loss` to the evaluation whose gradient "
                "is kept."
            )
        self._last_seen = (step, weakref.ref(images))

    def embedded(self, step: int) -> None:
        """Note that the embedding loss of a step awaits the optimizer."""
        self._awaited = step

    def stepped(self) -> None:
        """Note that an optimizer takes its step."""
        self._awaited = None

    def roll_back(self) -> None:
        """Roll back the last embedding step, because its loss was not used."""
        self._awaited = None
        self._marker.roll_back()

    def stop(self) -> None:
        """Forget the last batch."""
        self._last_seen = None
