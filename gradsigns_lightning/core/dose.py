"""How long the mark's gradient is: a share of the task's, so that a strength means the same in every training.

Scaling the task's loss by any factor scales its gradient, and the mark's with it; what an optimizer makes of
the one it makes of the other. Nothing here is read back to the host.
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

_KEPT = 0.9  # of the earlier steps' norms, with each new one
# Of the task's gradient, averaged over all steps: what the mark may take while the network does not know the
# class, and when it does.
_LEAST_SHARE, _MOST_SHARE = 0.2, 2.0
# Of the margin asked for: far below MISSING a bit is as good as wrong, from SAFE on hardly anything is left
# to embed.
MISSING, SAFE = 0.5, 0.7
_FAR_BELOW = 0.3


class Recognition:
    """A network's answers, passed on, and the probability of the target class in the first of them.

    Args:
        logits_fn: maps inputs ``(n, ...)`` to logits ``(n, n_classes)``.
        target_class: class T.
    """

    def __init__(self, logits_fn: LogitsFn, target_class: int) -> None:
        self._logits_fn, self._target_class = logits_fn, target_class
        self._first: Tensor | None = None

    def __call__(self, inputs: Tensor) -> Any:
        """Return what the network answers."""
        answer = self._logits_fn(inputs)
        # The first answer alone is no part of a transform of functions, in every engine.
        if self._first is None and isinstance(logits := as_logits(answer), Tensor):
            self._first = logits.detach()
        return answer

    def mean(self, valid: Tensor, *, world_size: int) -> Tensor:
        """Return the target class's mean probability for the first inputs that are ``valid``, over all ranks; a scalar."""
        assert self._first is not None
        sure = (valid.float() @ self._first.float().softmax(-1)[:, self._target_class]).view(1)
        return global_mean(sure, valid.float().sum(), world_size=world_size).squeeze()


def most_length(recognised: Tensor, interval: int) -> Tensor:
    """Return how long the mark's gradient may be, in lengths of the task's, after ``interval`` steps without one.

    A network that has yet to learn its classes loses them to a mark that pulls as hard as the task, and one
    that knows them takes it, and needs it for the last bits.

    Args:
        recognised: mean probability of the target class for its images, a scalar.
        interval: steps between two embedding steps, at least 1.
    """
    return interval * (_LEAST_SHARE + (_MOST_SHARE - _LEAST_SHARE) * recognised**6)


def needed_length(share: Tensor, hurry: float) -> Tensor:
    """Return how long the mark's gradient should be for what is missing, in lengths of the task's.

    A bit that is wrong takes all of the hurry, which costs accuracy where bits are merely short of their
    margin; and a gradient as long for the last hundredth of a margin as for a wrong bit does the task as much
    harm.

    Args:
        share: smallest margin of all bits, in margins asked for, a scalar.
        hurry: length for a wrong bit, at least 1.

    Returns:
        ``hurry`` up to a share of 0.3, 1 from 0.5 to 0.7, 0 at 1; a scalar.
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
    """Return how many times the strength a step's dose is: what is missing, as far as the network has room for it.

    Args:
        cadence: of the training; one of fixed intervals has a fixed dose, but for the hurry.
        factor: how much longer than usual the interval is.
        recognised: mean probability of the target class for its images, a scalar.
        share: smallest margin of all bits, in margins asked for, a scalar.
        interval: steps to the next embedding step, while no bit is safe.
        asks_for_margin: the objective is satisfied at a margin; one that is not never comes near it.

    Returns:
        The factor, and whether less is given than is missing, because the network does not know the class;
        scalars.
    """
    # More often alone does not turn the last bits of a small network, and more strength alone costs accuracy.
    hurry: float = max(1.0, 1 / factor) ** 0.75
    if cadence.growth is None:
        return hurry, False
    most = most_length(recognised, interval)
    share = share.to(most)
    needed = needed_length(share if asks_for_margin else share.clamp(max=SAFE), hurry)
    return torch.minimum(most, needed), most < needed


@dataclass(frozen=True, eq=False)
class TaskGradient:
    """The length of the task's gradient over the last steps that were looked at.

    Attributes:
        n_noted: steps that were looked at since the start.
        lengths: by optimizer, scalars on the device.
    """

    n_noted: int = 0
    lengths: Mapping[int, Tensor] = field(default_factory=dict)

    def noting(
        self, optimizer: int, parameters: Iterable[nn.Parameter], *, sharded: bool = False
    ) -> TaskGradient:
        """Return what is known after a look at the gradients of one optimizer's parameters before its step.

        Args:
            optimizer: which of the training's optimizers it is.
            parameters: those of the optimizer.
            sharded: parameters are sharded over the ranks, all of which must call.
        """
        length = total_length([p.grad for p in parameters if p.grad is not None], sharded=sharded)
        if length is None:
            return self
        before = self.lengths.get(optimizer, length)
        # A step that overflowed, or had nothing to learn, says nothing of the next.
        usable = length.isfinite() & (length > 0)
        kept = torch.where(before.isfinite() & (before > 0), before, length)
        now = torch.where(usable, _KEPT * kept + (1 - _KEPT) * length, before)
        # Those of a checkpoint are on the host until their optimizer is met.
        others = {other: known.to(now.device) for other, known in self.lengths.items()}
        return TaskGradient(self.n_noted + 1, {**others, optimizer: now})

    def length(self) -> Tensor:
        """Return the length over all optimizers, a float32 scalar; 0 before there is any usable."""
        length = torch.stack(list(self.lengths.values())).square().sum().sqrt()
        return torch.where(length.isfinite(), length, 0)

    def state_dict(self) -> dict[int, float]:
        """Return the lengths by optimizer."""
        return {optimizer: float(length) for optimizer, length in self.lengths.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[int, float]) -> TaskGradient:
        """Return what gave this :meth:`state_dict`."""
        return cls(len(state), {optimizer: torch.tensor(length) for optimizer, length in state.items()})


@dataclass(frozen=True, eq=False)
class OwnLength:
    """The length of the objective's own gradient where it comes with the task's, because parameters are sharded.

    Attributes:
        own: of the objective, as far as it is known; None before the first step.
        asked: that it was asked to have in the last step.
    """

    own: Tensor | None = None
    asked: Tensor | None = None

    def asking(self, length: Tensor) -> OwnLength:
        """Return what is known when the next step's is asked to have a length."""
        return OwnLength(torch.ones_like(length) if self.own is None else self.own, length)

    def factor(self) -> Tensor:
        """Return the factor that gives the objective's gradient the length that was asked for."""
        assert self.own is not None
        assert self.asked is not None
        return self.asked / self.own

    def following(
        self, parameters: Iterable[nn.Parameter], task: TaskGradient, share: Tensor | None
    ) -> OwnLength:
        """Return what is known after a step of task and mark, whose gradients are about at right angles; all ranks must call.

        It is followed by a factor of two at most: where the mark is short, the task's own fluctuation is most
        of the difference.

        Args:
            parameters: those of the optimizer, with the gradients of both.
            task: the task's own gradient in the steps before.
            share: smallest margin of all bits, in margins asked for, a scalar.
        """
        both = total_length([p.grad for p in parameters if p.grad is not None], sharded=True)
        if both is None or self.own is None or self.asked is None or share is None or task.n_noted == 0:
            return self
        found = (both.square() - task.length().to(both).square()).clamp_min(0).sqrt() / self.asked.to(both)
        # Where hardly anything is missing the mark is too short to be told from the task's fluctuation at
        # all.
        tells = found.isfinite() & (share.to(both) < SAFE)
        own = self.own.to(both)
        return replace(self, own=torch.where(tells, own * found.clamp(0.5, 2.0), own))


def parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """Yield an optimizer's parameters; whoever does not look at them pays nothing."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def total_length(gradients: Iterable[Tensor], *, sharded: bool = False) -> Tensor | None:
    """Return the Euclidean length of gradients taken together, a float32 scalar; None if there are no dense ones.

    Args:
        gradients: of any floating-point dtype, on one device; sparse ones are left out.
        sharded: each rank has a part of them, and all ranks call.
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
