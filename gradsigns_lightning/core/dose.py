"""The length of the mark's gradient, relative to the task's.

Thus a strength means the same in every training: scaling the task's loss scales both gradients, and the
optimizer treats them alike. Nothing here is read back to the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsigns_lightning.core.distributed import global_mean
from gradsigns_lightning.core.schedule import Cadence
from gradsigns_lightning.core.signature import LogitsFn, as_logits

_KEPT = 0.9  # weight of the earlier steps in the running mean of the lengths
# The mark's gradient in lengths of the task's, averaged over all steps: its limit while the network does not
# know the class, and when it does.
_LEAST_SHARE, _MOST_SHARE = 0.2, 2.0
# Shares of the margin that the objective asks for: far below MISSING a bit is as good as wrong; from SAFE on
# hardly anything is left to embed.
MISSING, SAFE = 0.5, 0.7
_FAR_BELOW = 0.3


class Recognition:
    """Passes on a network's logits, and records the target class's probability in its first call.

    Args:
        logits_fn: maps inputs ``(n, ...)`` to logits ``(n, n_classes)``.
        target_class: class T.
    """

    def __init__(self, logits_fn: LogitsFn, target_class: int) -> None:
        self._logits_fn, self._target_class = logits_fn, target_class
        self._first: Tensor | None = None

    def __call__(self, inputs: Tensor) -> Any:
        """Return the network's output."""
        output = self._logits_fn(inputs)
        # In every engine only the first call lies outside of function transforms (`torch.func`).
        if self._first is None and isinstance(logits := as_logits(output), Tensor):
            self._first = logits.detach()
        return output

    def mean(self, valid: Tensor, *, world_size: int) -> Tensor:
        """Return the target class's mean probability over the ``valid`` images of all ranks, a scalar."""
        assert self._first is not None
        summed = (valid.float() @ self._first.float().softmax(-1)[:, self._target_class]).view(1)
        return global_mean(summed, valid.float().sum(), world_size=world_size).squeeze()


def most_length(recognised: Tensor, interval: int) -> Tensor:
    """Return the largest length of the mark's gradient after ``interval`` steps, in lengths of the task's.

    A network that has yet to learn its classes loses them to a mark that pulls as hard as the task. A network
    that knows them tolerates such a mark, and needs it for the last bits.

    Args:
        recognised: mean probability of the target class for its images, a scalar.
        interval: steps between two embedding steps, at least 1.
    """
    return interval * (_LEAST_SHARE + (_MOST_SHARE - _LEAST_SHARE) * recognised**6)


def needed_length(share: Tensor, hurry: float) -> Tensor:
    """Return how long the mark's gradient should be to turn the bits, in lengths of the task's.

    Only a wrong bit gets the full length. Where bits are merely short of their margin it would cost accuracy,
    and it would do the task as much harm for the last hundredth of a margin as for a wrong bit.

    Args:
        share: smallest margin of all bits, relative to the objective's margin, a scalar.
        hurry: length for a wrong bit, at least 1.

    Returns:
        A scalar: ``hurry`` up to a share of 0.3, 1 from 0.5 to 0.7, 0 at 1.
    """
    haste = ((MISSING - share) / (MISSING - _FAR_BELOW)).clamp(0, 1)
    return hurry**haste * ((1 - share) / (1 - SAFE)).clamp(0, 1)


def urgency(
    cadence: Cadence,
    factor: float,
    *,
    recognised: Tensor,
    share: Tensor,
    interval: int,
    asks_for_margin: bool,
) -> tuple[Tensor | float, Tensor | bool]:
    """Return the factor on the strength for one embedding step: what is needed, up to what the network takes.

    Args:
        cadence: the training's cadence; with fixed intervals the factor depends on the hurry alone.
        factor: how much longer than usual the interval is.
        recognised: mean probability of the target class for its images, a scalar.
        share: smallest margin of all bits, relative to the objective's margin, a scalar.
        interval: steps to the next embedding step, while no bit is safe.
        asks_for_margin: whether the objective is satisfied at some margin.

    Returns:
        The factor, and whether it is less than needed because the network does not know the class; scalars.
    """
    # Embedding more often is not enough for the last bits of a small network, and more strength instead costs
    # accuracy.
    hurry: float = max(1.0, 1 / factor) ** 0.75
    if cadence.growth is None:
        return hurry, False
    most = most_length(recognised, interval)
    share = share.to(most)
    needed = needed_length(share if asks_for_margin else share.clamp(max=SAFE), hurry)
    return torch.minimum(most, needed), most < needed


@dataclass(frozen=True, eq=False)
class TaskGradient:
    """The length of the task's gradient, a running mean over the steps that were observed.

    Attributes:
        n_noted: number of observed steps.
        lengths: length by optimizer, scalars on the device.
    """

    n_noted: int = 0
    lengths: Mapping[int, Tensor] = field(default_factory=dict)

    def noting(
        self, optimizer: int, parameters: Iterable[nn.Parameter], *, sharded: bool = False
    ) -> TaskGradient:
        """Return the state after observing the gradients of one optimizer's parameters before its step.

        Args:
            optimizer: index of the optimizer.
            parameters: the optimizer's parameters.
            sharded: parameters are sharded over the ranks, all of which must call.
        """
        length = total_length([p.grad for p in parameters if p.grad is not None], sharded=sharded)
        if length is None:
            return self
        before = self.lengths.get(optimizer, length)
        # A step that overflowed, or had nothing to learn, says nothing about the next one.
        usable = length.isfinite() & (length > 0)
        kept = torch.where(before.isfinite() & (before > 0), before, length)
        now = torch.where(usable, _KEPT * kept + (1 - _KEPT) * length, before)
        # Lengths from a checkpoint are on the host until their optimizer steps.
        others = {other: known.to(now.device) for other, known in self.lengths.items()}
        return TaskGradient(self.n_noted + 1, {**others, optimizer: now})

    def length(self) -> Tensor:
        """Return the length over all optimizers, a float32 scalar; 0 before any usable one was observed."""
        length = torch.stack(list(self.lengths.values())).square().sum().sqrt()
        return torch.where(length.isfinite(), length, 0)

    def state_dict(self) -> dict[int, float]:
        """Return the lengths by optimizer."""
        return {optimizer: float(length) for optimizer, length in self.lengths.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[int, float]) -> TaskGradient:
        """Return the object from its :meth:`state_dict`."""
        return cls(len(state), {optimizer: torch.tensor(length) for optimizer, length in state.items()})


@dataclass(frozen=True, eq=False)
class OwnLength:
    """The length of the objective's own gradient, estimated where it comes together with the task's.

    That is so if parameters are sharded.

    Attributes:
        own: estimated length of the objective's gradient; None before the first step.
        asked: length that was asked for in the last step.
    """

    own: Tensor | None = None
    asked: Tensor | None = None

    def asking(self, length: Tensor) -> OwnLength:
        """Return the state after asking for a length in the next step."""
        return OwnLength(torch.ones_like(length) if self.own is None else self.own, length)

    def factor(self) -> Tensor:
        """Return the factor that brings the objective's gradient to the length that was asked for."""
        assert self.own is not None
        assert self.asked is not None
        return self.asked / self.own

    def following(
        self, parameters: Iterable[nn.Parameter], task: TaskGradient, share: Tensor | None
    ) -> OwnLength:
        """Return the state after a step of task and mark together; all ranks must call.

        The two gradients are taken as orthogonal. The estimate changes by a factor of two at most, because
        where the mark's gradient is short most of the difference is the task's own fluctuation.

        Args:
            parameters: the optimizer's parameters, with the sum of both gradients.
            task: the task's own gradient in the steps before.
            share: smallest margin of all bits, relative to the objective's margin, a scalar.
        """
        both = total_length([p.grad for p in parameters if p.grad is not None], sharded=True)
        if both is None or self.own is None or self.asked is None or share is None or task.n_noted == 0:
            return self
        found = (both.square() - task.length().to(both).square()).clamp_min(0).sqrt() / self.asked.to(both)
        # Where hardly anything is missing, the mark's gradient is lost in the task's fluctuation.
        tells = found.isfinite() & (share.to(both) < SAFE)
        own = self.own.to(both)
        return replace(self, own=torch.where(tells, own * found.clamp(0.5, 2.0), own))


def parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """Return an iterator over an optimizer's parameters, which costs nothing until it is used."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def total_length(gradients: Iterable[Tensor], *, sharded: bool = False) -> Tensor | None:
    """Return the Euclidean length of all gradients together, a float32 scalar; None if none is dense.

    Args:
        gradients: gradients of any floating-point dtype, on one device; sparse ones are left out.
        sharded: each rank has a part of them, and all ranks must call.
    """
    parts = [g.to_local() if hasattr(g, "to_local") else g for g in gradients if g.layout is torch.strided]
    if not parts and not sharded:
        return None
    # In float32 at least: squares of half-precision numbers overflow.
    lengths = [
        torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32)).float()
        for part in parts
    ]
    square = torch.stack(lengths).square().sum() if lengths else torch.zeros(())
    if sharded and dist.is_initialized():
        dist.all_reduce(square)
    return square.sqrt()
