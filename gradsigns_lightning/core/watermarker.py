"""The watermarker: all that embedding is, without a Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradsigns_lightning.core.buffer import TargetBuffer
from gradsigns_lightning.core.distributed import global_mean, on_all_ranks
from gradsigns_lightning.core.dose import MISSING, SAFE, Recognition, TaskGradient, most_length, needed_length, total_length
from gradsigns_lightning.core.engines import AUTO, Engine, differentiated, make_engines, probe
from gradsigns_lightning.core.engines.probe import N_IMAGES
from gradsigns_lightning.core.inputs import carrier_inputs
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.key.signature_key import check_images
from gradsigns_lightning.core.objective import Objective, make_objective
from gradsigns_lightning.core.result import is_readable
from gradsigns_lightning.core.schedule import DEFAULT_STRENGTH, Cadence, StrengthSchedule
from gradsigns_lightning.core.signature import LogitsFn, SignatureProjector, pixel_scale
from gradsigns_lightning.core.torch_state.contexts import frozen_statistics
from gradsigns_lightning.core.torch_state.running_mean import RunningMeans
from gradsigns_lightning.core.turns import Turns
from gradsigns_lightning.core.utils.checks import check_instance, check_int, check_number

_SLACK = 0.1  # of the range of raw pixels: what an augmentation may add
_AMPLE = 0.7  # in itself: about three times the noise that z has in a reading of 50 images
_LEAST_MOMENTUM = 0.05  # of batch normalisation, whose statistics then describe the weights of 20 steps before


class Watermarker:
    """Turns a stream of batches into an embedding loss (GradSigns, MLSys 2021, section 3.2).

    Args:
        key: the owner's key.
        strength: schedule of the embedding strength, or a number for a constant one: the length of the mark's gradient in a step
            that embeds, in lengths of the task's gradient. While bits are missing and the cadence hurries, it grows with the
            hurry: by default up to 4.8 times. The default cadence also holds it back: while the network does not know the
            target class, to a fifth of the task's pull, averaged over all steps, and towards the margin, to nothing
            (docs/dose.md).
        objective: ``"margin"``, ``"paper"`` or an object of that protocol.
        engine: ``"auto"``, ``"double_backward"``, ``"forward_over_reverse"``, ``"finite_difference"``, or an object of that
            protocol.
        cadence: interval between embedding steps, or a number of optimizer steps; by default :meth:`Cadence.following`.
        n_images: images of the target class in one embedding step, on each rank; at least 1.
        momentum: share of the previous embedding steps' mean gradient in the one that is held to the bits, 0 up to 1
            (exclusive); what counts is the class's mean, of which one small batch is a noisy sample.
        carrier_layer: name of the submodule whose output carries the mark, for networks whose input is not differentiable (the
            embedding of a text classifier); None for the input itself.
    """

    def __init__(
        self,
        key: WatermarkKey,
        *,
        strength: float | StrengthSchedule = DEFAULT_STRENGTH,
        objective: str | Objective = "margin",
        engine: str | Engine = AUTO,
        cadence: int | Cadence | None = None,
        n_images: int = 32,
        momentum: float = 0.5,
        carrier_layer: str | None = None,
    ) -> None:
        check_instance("key", key, WatermarkKey)
        self.key = key
        self.schedule = strength if isinstance(strength, StrengthSchedule) else StrengthSchedule(strength)
        self.objective = make_objective(objective, key)
        self.objective.check_key(key)
        self.engines = make_engines(engine)
        self.engine = self.engines[0]
        self.engine_name = engine if isinstance(engine, str) else engine.name
        self.carrier_layer = carrier_layer
        self.cadence = Cadence.following() if cadence is None else cadence if isinstance(cadence, Cadence) else Cadence(cadence)
        self.momentum = check_number("momentum", momentum, minimum=0)
        if momentum >= 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")
        self.buffer = TargetBuffer(check_int("n_images", n_images, minimum=1), key.target_class)
        self.task = TaskGradient()
        self.turns = Turns()
        self._projector: SignatureProjector | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what earlier training left behind: steps, interval, mean gradient and images."""
        self.buffer.clear()
        self.n_embedded = 0
        self.n_spoilt: Tensor | int = 0  # of them, those whose gradients were not finite; on the device
        self._first_step: int | None = None
        self._last_step: int | None = None
        self._factor = 1.0  # how much longer the interval is than usual
        self._state: Tensor | None = None  # of the bits; read one interval later, when the device has long computed it
        self._share = torch.zeros(())  # smallest margin in the last embedding step, in margins asked for; on the device
        self.value: Tensor | None = None  # of the objective in the last embedding step; on the device
        self.recognised: Tensor | None = None  # mean probability of the target class for its images then; on the device
        # (2 b_j - 1) z_j of the mean gradient in the first and the last embedding step that had one; on the device
        self.first_margins: Tensor | None = None
        self.margins: Tensor | None = None
        self._own: Tensor | None = None  # length of the objective's own gradient, where it is known afterwards only
        self._asked = torch.zeros(())  # length that it was asked to have in the last step, likewise
        self._before: tuple[int | None, int | None, Tensor | None, Tensor | None, Tensor | int] = (None, None, None, None, 0)
        self.turns.reset()
        self.task.reset()
        self._mean_gradient: Tensor | None = None  # over the whole input: a saved one must not tell where the carriers are

    def observe(self, images: Tensor, labels: Tensor, *, step: int) -> None:
        """Keep the target class's images of one batch of optimizer step ``step``; see :meth:`check_batch`.

        Between two embedding steps only the last batches before the next one are looked at, which makes the others free. Steps
        that start over begin another training.
        """
        self.check_batch(images, labels)
        if self._last_step is not None and step < self._last_step:
            self._first_step = self._last_step = None
        self.turns.open_batch(step)
        if self._is_near(step):
            self.buffer.push(images, labels)

    def observe_gradients(self, optimizer: int, parameters: Iterable[nn.Parameter], *, step: int, sharded: bool = False) -> None:
        """Look at the task's gradient right before optimizer step ``step``, if the next embedding step is near.

        Args:
            optimizer: which of the training's optimizers it is.
            parameters: those of the optimizer; their gradients are neither scaled nor clipped.
            step: optimizer step.
            sharded: parameters are sharded over the ranks, all of which must call.
        """
        is_marked = self.turns.note(optimizer)
        if step == self._last_step:
            if sharded:
                self._note_own(parameters)
        elif not is_marked and self._is_near(step):
            self.task.note(optimizer, parameters, sharded=sharded)

    def check_batch(self, images: Tensor, labels: Tensor) -> None:
        """Refuse a batch that is not floating-point images ``(n, C, H, W)`` and classes ``(n,)``.

        With a carrier layer the inputs may be anything ``(n, ...)``; the layer's output is checked when it is there.

        Raises:
            ValueError: the images do not have the key's input shape, or the labels are not one class index per image.
        """
        if self.carrier_layer is None:
            check_images(images, self.key)
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"`labels` must have shape ({images.shape[0]},), one class index per image, got {tuple(labels.shape)}."
            )
        if self.buffer.images is not None and images.shape[1:] != self.buffer.images.shape[1:]:
            raise ValueError(
                f"`images` must have one shape in all batches, as the carriers are fixed places of it: got "
                f"{tuple(images.shape[1:])} after {tuple(self.buffer.images.shape[1:])}. Pad text to a fixed length."
            )

    def strength_at(self, *, step: int, epoch: int) -> float:
        """Return the strength of the embedding loss at an optimizer step."""
        return self.schedule.at(epoch=epoch, steps_since_start=step - (step if self._first_step is None else self._first_step))

    def is_due(self, *, step: int, epoch: int) -> bool:
        """Return whether optimizer step ``step`` of ``epoch`` embeds; the same answer on all ranks."""
        if self.buffer.images is None or not self.task.n_noted or self.strength_at(step=step, epoch=epoch) == 0:
            return False
        if self._last_step is None:
            return True
        if step < self._earliest():
            return False
        self._settle()
        return step >= self._last_step + self.turns.interval(self._interval(self._factor), self.n_embedded)

    def prepare(
        self, module: nn.Module, logits_fn: LogitsFn, images: Tensor, *, world_size: int = 1, sharded: bool = False
    ) -> None:
        """Try the engines on a few images before anything is trained, and take the first that works on every rank.

        Args:
            module: module whose parameters are trained.
            logits_fn: maps inputs ``(n, C, H, W)`` to logits ``(n, n_classes)``.
            images: inputs of the first batch, any class.
            world_size: number of data-parallel ranks, all of which must call.
            sharded: parameters are sharded over the ranks.

        Raises:
            ValueError: no engine works; the message tells of each what is missing.
        """
        problems = []
        _warn_of_lag(module)
        if self.carrier_layer is None:
            _warn_of_scale(images, self.key)
        with frozen_statistics(module) as training, RunningMeans(training).followed():
            inputs, logits_fn = carrier_inputs(module, logits_fn, images[:N_IMAGES], self.key.input_shape, self.carrier_layer)
            for engine in [engine for engine in self.engines if engine.sharding_safe or not sharded]:
                problem = probe(engine, module, logits_fn, inputs, self.key.target_class, sharded=sharded)
                if on_all_ranks(problem is None, device=images.device, world_size=world_size):
                    self.engine = engine
                    return
                problems.append(f"  - engine {engine.name!r}: {problem or 'it fails on another rank'}.")
        raise ValueError("\n".join(["GradSigns cannot embed in this model:", *problems]))

    def loss(
        self,
        module: nn.Module,
        logits_fn: LogitsFn,
        *,
        step: int,
        epoch: int,
        world_size: int = 1,
        sharded: bool = False,
    ) -> Tensor:
        """Return the embedding loss, a scalar to be added to the task's loss at this optimizer step.

        It is scaled so that its gradient has ``strength`` times the length of the task's.

        Its gradients are computed here and handed out by its ``backward()``; no graph of the network stays in memory.

        Args:
            module: module whose parameters are trained; its statistics are frozen meanwhile.
            logits_fn: maps inputs ``(n, C, H, W)`` to logits ``(n, n_classes)``.
            step: optimizer step.
            epoch: epoch.
            world_size: number of data-parallel ranks, all of which must call.
            sharded: parameters are sharded over the ranks; their gradients exist only in the task's own backward pass, so
                that the graph stays until then.
        """
        images, valid = self.buffer.images, self.buffer.valid
        assert images is not None, "observe() comes before loss()"
        assert valid is not None, "observe() comes before loss()"
        self._before = (self._first_step, self._last_step, self._state, self._mean_gradient, self.n_spoilt)
        self._first_step = step if self._first_step is None else self._first_step
        self._last_step = step
        self.turns.mark()

        def objective(gradients: Tensor) -> Tensor:
            weights = valid.to(gradients.dtype)
            projector = self.projector(gradients.device, gradients.dtype)
            rows = projector.directions(gradients) if self.objective.of_directions else projector.raw(gradients)
            mean = global_mean(weights @ rows, weights.sum(), world_size=world_size)
            held = projector.carrier_gradient(self._smooth(mean))
            margins = projector.signs * projector.project(held.detach())
            self._note_margins(margins)
            self._share = self._share_of(margins)
            self._state = self._state_of(margins, satisfied=self.objective.satisfied(held.detach(), projector))
            # Without an image on any rank there is no gradient and nothing to hold.
            return self.objective(held, projector) * (mean.detach() != 0).any()

        with frozen_statistics(module) as training:
            inputs, logits_fn = carrier_inputs(module, logits_fn, images, self.key.input_shape, self.carrier_layer)
            network = Recognition(logits_fn, self.key.target_class)
            means = RunningMeans(training)
            with means.followed():
                embedded = self.engine.embed(module, network, inputs, self.key.target_class, objective)
            self.value, loss = embedded.value, embedded.surrogate
            sure = (valid.float() @ network.probabilities()).view(1)
            self.recognised = global_mean(sure, valid.float().sum(), world_size=world_size).squeeze()
            dose = self.strength_at(step=step, epoch=epoch) * self._urgency(self.recognised)
            length = dose * self.task.length().to(images.device)
            if sharded:
                self._own = torch.ones_like(length) if self._own is None else self._own
                self._asked = length
                loss = loss * (length / self._own).to(loss.dtype)
            else:
                loss = differentiated(loss, module, length=length, world_size=world_size, means=means)
        self.n_embedded += 1
        self.n_spoilt = self.n_spoilt + loss.detach().isnan()
        return loss.nan_to_num(nan=0.0)

    def take_back(self) -> None:
        """Forget the last :meth:`loss`, which nobody used: the next batch is asked to embed in its place."""
        self.n_embedded -= 1
        self._first_step, self._last_step, self._state, self._mean_gradient, self.n_spoilt = self._before
        self.turns.take_back()

    def coming_steps(self) -> Iterator[int]:
        """Yield the optimizer steps that will embed if bits are missing all along; none before the first has."""
        if self._first_step is None or self._last_step is None:
            return
        step, factor = self._last_step, self._factor
        for n_embedded in count(self.n_embedded):
            factor = self.cadence.next_factor(factor, missing=True, safe=False, satisfied=False)
            interval = self.cadence.interval(step - self._first_step, factor)
            step += self.turns.whole_batches(self.turns.interval(interval, n_embedded))
            yield step

    def projector(self, device: torch.device, dtype: torch.dtype) -> SignatureProjector:
        """Return the key's tensors on ``device``, derived once."""
        if self._projector is None or self._projector.carriers.device != device or self._projector.signs.dtype != dtype:
            self._projector = SignatureProjector.from_key(self.key, device=device, dtype=dtype)
        return self._projector

    def state_dict(self) -> dict[str, Any]:
        """Return the state of schedule and cadence as plain types and one tensor that tells nothing about the key."""
        self._settle()
        return {
            "first_step": self._first_step,
            "last_step": self._last_step,
            "factor": self._factor,
            "task_gradient": self.task.state_dict(),
            "mean_gradient": None if self._mean_gradient is None else self._mean_gradient.cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave; the buffer fills again from the stream.

        Of a state from before the cadence had a factor only the steps are taken: its interval was that of another rule, and its
        mean gradient was of gradients that were not brought to unit length.
        """
        self._first_step, self._last_step = state["first_step"], state["last_step"]
        is_former = "factor" not in state
        self._factor = 1.0 if is_former else state["factor"]
        self._state = None
        self.task.load_state_dict({} if is_former else state["task_gradient"])
        self._mean_gradient = None if is_former else state["mean_gradient"]

    def _smooth(self, mean: Tensor) -> Tensor:
        if self.momentum == 0:
            return mean
        new = mean.detach()
        previous = None if self._mean_gradient is None else self._mean_gradient.to(mean)
        smoothed = new if previous is None else self.momentum * previous + (1 - self.momentum) * new
        # One step that overflowed must not spoil all that follow.
        self._mean_gradient = torch.where(new.isfinite().all(), smoothed, torch.zeros_like(new) if previous is None else previous)
        return smoothed + (mean - new)

    def _note_margins(self, margins: Tensor) -> None:
        # Zero without an image, NaN in a step that overflowed.
        usable = is_readable(margins)
        none = torch.full_like(margins, torch.nan)
        first, last = (none if known is None else known.to(margins) for known in (self.first_margins, self.margins))
        self.margins = torch.where(usable, margins, last)
        self.first_margins = torch.where(first.isnan(), self.margins, first)

    def _interval(self, factor: float) -> int:
        assert self._first_step is not None
        assert self._last_step is not None
        return self.cadence.interval(self._last_step - self._first_step, factor)

    def _urgency(self, recognised: Tensor) -> Tensor | float:
        """Return how many times the strength this step's dose is: what is missing, and what the network has room for."""
        # More often alone does not turn the last bits of a small network, and more strength alone costs accuracy.
        hurry: float = max(1.0, 1 / self._factor) ** 0.75
        if self.cadence.growth is None:
            return hurry
        most = most_length(recognised, self._interval(min(self._factor, 1.0)))
        share = self._share.to(most)
        # An objective that asks for no margin never comes near it.
        return torch.minimum(most, needed_length(share if hasattr(self.objective, "margin") else share.clamp(max=SAFE), hurry))

    def _earliest(self) -> int:
        """Return the first step that may embed, whatever the last one is found to have left."""
        assert self._last_step is not None
        factor = self._factor
        if self._state is not None:
            factor = self.cadence.next_factor(factor, missing=True, safe=False, satisfied=False)
        return self._last_step + self.turns.interval(self._interval(factor), self.n_embedded)

    def _is_near(self, step: int) -> bool:
        """Return whether the next embedding step is so near that images and the task's gradient count; the others are free."""
        if self._last_step is None:
            return True
        earliest = self._earliest()
        return step >= earliest - max((earliest - self._last_step) // 10, 5)

    def _state_of(self, margins: Tensor, *, satisfied: Tensor) -> Tensor:
        """Return whether a bit is missing, all are safe, and nothing needs to be embedded; shape ``(3,)``, bool."""
        share = self._share_of(margins)
        return torch.stack([share < MISSING, share >= SAFE, (margins.min() >= _AMPLE) | satisfied])

    def _share_of(self, margins: Tensor) -> Tensor:
        """Return the smallest margin in margins asked for, a scalar."""
        return margins.min() / getattr(self.objective, "margin", 1.0)

    def _settle(self) -> None:
        if self._state is not None:
            missing, safe, satisfied = self._state.tolist()
            self._factor = self.cadence.next_factor(self._factor, missing=missing, safe=safe, satisfied=satisfied)
            self._state = None

    def _note_own(self, parameters: Iterable[nn.Parameter]) -> None:
        """Follow the length of the objective's own gradient where it comes with the task's, which is about at right angles.

        By a factor of two at most: where the mark is short, the task's own fluctuation is most of the difference.
        """
        both = total_length([p.grad for p in parameters if p.grad is not None], sharded=True)
        if both is None or self._own is None or self.task.n_noted == 0:
            return
        found = (both.square() - self.task.length().to(both).square()).clamp_min(0).sqrt() / self._asked.to(both)
        # Where hardly anything is missing the mark is too short to be told from the task's fluctuation at all.
        tells = found.isfinite() & (self._share.to(both) < SAFE)
        self._own = torch.where(tells, self._own.to(both) * found.clamp(0.5, 2.0), self._own.to(both))


def _warn_of_scale(images: Tensor, key: WatermarkKey) -> None:
    """Warn of images that are no raw pixels of [0, 1] by the key's normalisation: a judge's would read another signature."""
    mean, std = pixel_scale(key, device=images.device, dtype=torch.float32)
    low, high = (images.detach().float() * std + mean).aminmax()
    if low < -_SLACK or high > 1 + _SLACK:
        warnings.warn(
            f"By the key's `input_mean` and `input_std` the first batch's raw pixels range from {low:.3g} to {high:.3g}, not "
            "from 0 to 1. Does the key say how the images are normalised? `verify` reads raw images in [0, 1], and would find "
            "another signature.",
            UserWarning,
            stacklevel=3,
        )


def _warn_of_lag(module: nn.Module) -> None:
    """Warn of running statistics that describe another network than the one whose weights are signed.

    ResNet-20 with Keras' momentum has in the middle of a training a cross-entropy of 7 by its running statistics and of 1.5 by
    a batch's, and the mark is embedded in the former.
    """
    lagging = [
        name
        for name, m in module.named_modules()
        if isinstance(m, _BatchNorm) and m.training and (m.momentum is None or m.momentum < _LEAST_MOMENTUM)
    ]
    if lagging:
        warnings.warn(
            f"The running statistics of {len(lagging)} batch normalisations ({lagging[0]!r}, ...) follow the weights late, as "
            f"their `momentum` is None or below {_LEAST_MOMENTUM}. The mark is embedded in the network that they describe, so "
            "bits may be lost: set `momentum` to 0.1, PyTorch's default.",
            UserWarning,
            stacklevel=3,
        )
