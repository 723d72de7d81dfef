"""Evaluations of the loss and optimizer steps: some optimizers make several of the one for one of the other, or none."""

from __future__ import annotations

import weakref

from torch import Tensor

from gradsigns_lightning.core.watermarker import Watermarker


class Evaluations:
    """Sees to it that every embedding loss becomes part of one optimizer step.

    Args:
        marker: the watermarker, which takes back a step that was not made.
    """

    def __init__(self, marker: Watermarker) -> None:
        self._marker = marker
        self.start()

    def start(self) -> None:
        """Forget the last fit."""
        self._awaited: int | None = None  # step that embedded and whose gradient no optimizer has taken yet
        self._last_seen: tuple[int, weakref.ref[Tensor]] | None = None

    def begin(self, images: Tensor, step: int, *, only: bool) -> None:
        """Take back an embedding step that Lightning counted, and that the module's own ``optimizer_step`` left out.

        Args:
            images: of the batch.
            step: optimizer step that comes next.
            only: the batch is to be the step's only one.

        Raises:
            ValueError: the batch comes a second time in a step of which it is to be the only one.
        """
        if self._awaited is not None and step > self._awaited:
            self.roll_back()
        if not only:
            return
        if self._last_seen is not None and self._last_seen[0] == step and self._last_seen[1]() is images:
            raise ValueError(
                "The optimizer evaluates the loss more than once a step (as SAM and LBFGS do), and the "
                "embedding loss is in the "
                "first evaluation only: use another optimizer, or manual optimization with GradSignsMixin, "
                "which adds "
                "`watermark_loss` where the gradient is kept."
            )
        self._last_seen = (step, weakref.ref(images))

    def embedded(self, step: int) -> None:
        """Await the optimizer step that takes the embedding loss."""
        self._awaited = step

    def stepped(self) -> None:
        """Note that an optimizer takes its step."""
        self._awaited = None

    def roll_back(self) -> None:
        """Take back the last embedding step: nobody used its loss."""
        self._awaited = None
        self._marker.roll_back()

    def stop(self) -> None:
        """Forget the last batch."""
        self._last_seen = None
