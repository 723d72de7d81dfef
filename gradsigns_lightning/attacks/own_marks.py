"""A mark that a thief embeds with a key of their own, handed in, because attacks know no key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn


class OwnMark(Protocol):
    """A mark of the thief's own, while one training embeds it."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor | None:
        """Return what is added to the task's loss of a batch, a scalar; None where this step embeds nothing.

        Args:
            model: the network that is trained.
            x: the batch's normalized inputs, shape ``(n, C, H, W)``.
            y: class indices, shape ``(n,)``.
            step: optimizer steps so far.
        """
        ...

    def before_step(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        """Look at the gradients of one optimizer step before it is taken.

        Args:
            parameters: those that are trained.
            step: optimizer steps so far.
        """
        ...


# Of a target class and a number; other numbers give other keys, and the same ones the same key.
MakeMark = Callable[[int, int], OwnMark]
