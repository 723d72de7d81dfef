"""The watermarker: all that embedding is, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsigns_lightning.core.buffer import TargetBuffer
from gradsigns_lightning.core.distributed import all_ranks_agree, global_mean
from gradsigns_lightning.core.dose import Recognition, urgency
from gradsigns_lightning.core.engines import check_engine, differentiated, make_engines
from gradsigns_lightning.core.engines.checking import N_IMAGES
from gradsigns_lightning.core.inputs import carrier_inputs
from gradsigns_lightning.core.key import WatermarkKey, key_of
from gradsigns_lightning.core.objective import make_objective
from gradsigns_lightning.core.preflight import warn_of_lag, warn_of_scale
from gradsigns_lightning.core.settings import DEFAULTS, EmbeddingSettings
from gradsigns_lightning.core.signature import LogitsFn, SignatureProjector
from gradsigns_lightning.core.state import EmbeddingState
from gradsigns_lightning.core.torch_state.contexts import frozen_statistics
from gradsigns_lightning.core.torch_state.running_mean import RunningMeans
from gradsigns_lightning.core.trained import only_trained
from gradsigns_lightning.core.turns import Turns
from gradsigns_lightning.core.utils.checks import check_instance


class Watermarker:
    """Turns a stream of batches into an embedding loss (GradSigns, MLSys 2021, section 3.2).

    Args:
        key: the owner's key.
        settings: how it is embedded.

    Attributes:
        state: all that is remembered from step to step.
        is_prepared: whether the engine was chosen for the model that is trained; to be set to False where
            another one is.
        engine: what differentiates the objective.

    Raises:
        ValueError: the key cannot carry the objective, or there is no objective or engine of that name.
    """

    def __init__(self, key: WatermarkKey, settings: EmbeddingSettings = DEFAULTS) -> None:
        check_instance("key", key, WatermarkKey)
        self.key = key
        self.settings = settings
        self.schedule = settings.make_schedule()
        self.cadence = settings.make_cadence()
        self.objective = make_objective(settings.objective, key)
        self.objective.check_key(key)
        self.engines = make_engines(settings.engine)
        self.engine = self.engines[0]
        # With a carrier layer the inputs may be anything; the layer's output is checked when it is there.
        input_shape = key.input_shape if settings.carrier_layer is None else None
        self.buffer = TargetBuffer(settings.n_images, key.target_class, input_shape)
        self.is_prepared = False
        self._projector: SignatureProjector | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what earlier training left behind: steps, interval, mean gradient and images."""
        self.buffer.clear()
        self.state = self._before = EmbeddingState()

    def step(
        self,
        module: nn.Module,
        logits_fn: LogitsFn,
        images: Tensor,
        labels: Tensor,
        *,
        step: int,
        epoch: int = 0,
        world_size: int = 1,
        sharded: bool = False,
        optimizers: Iterable[Optimizer] = (),
    ) -> Tensor | None:
        """Look at the first batch of an optimizer step, and return the embedding loss if the step embeds, else None.

        Between embedding steps nothing is computed. Before every optimizer step :meth:`observe_gradients` is
        to be called.

        Args:
            module: module whose parameters are trained.
            logits_fn: maps inputs ``(n, C, H, W)`` to logits ``(n, n_classes)``.
            images: the batch's inputs, floating point, shape ``(n, C, H, W)``.
            labels: class indices, shape ``(n,)``.
            step: optimizer step.
            epoch: epoch.
            world_size: number of data-parallel ranks, all of which must call.
            sharded: parameters are sharded over the ranks.
            optimizers: those of the training; parameters that none of them steps are taken for frozen.

        Raises:
            ValueError: the batch does not fit the key, or no engine works on this model.
        """
        if self.schedule.strength == 0:
            return None
        self.observe(images, labels, step=step)
        if not self.is_prepared:
            self.prepare(module, logits_fn, images, world_size=world_size, sharded=sharded)
        if not self.is_due(step=step, epoch=epoch):
            return None
        with only_trained(module, () if sharded else optimizers):
            return self.loss(
                module, logits_fn, step=step, epoch=epoch, world_size=world_size, sharded=sharded
            )

    def observe(self, images: Tensor, labels: Tensor, *, step: int) -> None:
        """Keep the target class's images of one batch of optimizer step ``step``.

        Between two embedding steps only the last batches before the next one are looked at, which makes the
        others free. Steps that start over begin another training.

        Raises:
            ValueError: the batch does not fit the key; see :meth:`TargetBuffer.check`.
        """
        self.buffer.check(images, labels)
        if self.state.last_step is not None and step < self.state.last_step:
            self.state = replace(self.state, first_step=None, last_step=None)
        self._note_turns(self.state.turns.opening(step))
        if self.state.is_near(step, self.cadence):
            self.buffer.push(images, labels)
        if self.state.last_step is not None and step >= self.state.earliest(self.cadence):
            self.state = self.state.settled(self.cadence)  # once, as the device is waited for

    def observe_gradients(
        self, optimizer: int, parameters: Iterable[nn.Parameter], *, step: int, sharded: bool = False
    ) -> None:
        """Look at the task's gradient right before optimizer step ``step``, if the next embedding step is near.

        Args:
            optimizer: which of the training's optimizers it is.
            parameters: those of the optimizer; their gradients are neither scaled nor clipped.
            step: optimizer step.
            sharded: parameters are sharded over the ranks, all of which must call.
        """
        is_marked = self.state.turns.takes(optimizer)
        self._note_turns(self.state.turns.noting(optimizer))
        state = self.state
        if step == state.last_step:
            if sharded:
                self.state = replace(
                    state, own_length=state.own_length.following(parameters, state.task_gradient, state.share)
                )
        elif not is_marked and state.is_near(step, self.cadence):
            self.state = replace(
                state, task_gradient=state.task_gradient.noting(optimizer, parameters, sharded=sharded)
            )

    def close_batch(self) -> None:
        """Note that the batch is over: where optimizers take turns, the next one may come without :meth:`step`."""
        self._note_turns(self.state.turns.closing())

    def strength_at(self, *, step: int, epoch: int) -> float:
        """Return the strength of the embedding loss at an optimizer step."""
        first = self.state.first_step
        return self.schedule.at(epoch=epoch, steps_since_start=0 if first is None else step - first)

    def is_due(self, *, step: int, epoch: int) -> bool:
        """Return whether optimizer step ``step`` of ``epoch`` embeds; the same answer on all ranks."""
        if (
            self.buffer.images is None
            or not self.state.task_gradient.n_noted
            or self.strength_at(step=step, epoch=epoch) == 0
        ):
            return False
        return self.state.is_due(step, self.cadence)

    def prepare(
        self,
        module: nn.Module,
        logits_fn: LogitsFn,
        images: Tensor,
        *,
        world_size: int = 1,
        sharded: bool = False,
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
        warn_of_lag(module)
        if self.settings.carrier_layer is None:
            warn_of_scale(images, self.key)
        with frozen_statistics(module) as training, RunningMeans(training).followed():
            inputs, logits_fn = self._carrier_inputs(module, logits_fn, images[:N_IMAGES])
            for engine in [engine for engine in self.engines if engine.sharding_safe or not sharded]:
                problem = check_engine(
                    engine, module, logits_fn, inputs, self.key.target_class, sharded=sharded
                )
                if all_ranks_agree(problem is None, device=images.device, world_size=world_size):
                    self.engine, self.is_prepared = engine, True
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

        Its gradients are computed here and handed out by its ``backward()``; no graph of the network stays in
        memory.

        Args:
            module: module whose parameters are trained; its statistics are frozen meanwhile.
            logits_fn: maps inputs ``(n, C, H, W)`` to logits ``(n, n_classes)``.
            step: optimizer step.
            epoch: epoch.
            world_size: number of data-parallel ranks, all of which must call.
            sharded: parameters are sharded over the ranks; their gradients exist only in the task's own
                backward pass, so that the graph stays until then.
        """
        images, valid = self.buffer.images, self.buffer.valid
        assert images is not None, "observe() comes before loss()"
        assert valid is not None, "observe() comes before loss()"
        before = self.state.settled(self.cadence).starting_at(step)
        found: list[EmbeddingState] = []

        def objective(gradients: Tensor) -> Tensor:
            value, after = self._held_to_the_bits(gradients, valid, before, world_size)
            found.append(after)
            return value

        with frozen_statistics(module) as training:
            means = RunningMeans(training)
            inputs, logits_fn = self._carrier_inputs(module, logits_fn, images)
            network = Recognition(logits_fn, self.key.target_class)
            with means.followed():
                embedded = self.engine.embed(module, network, inputs, self.key.target_class, objective)
            state = replace(
                found[-1], value=embedded.value, recognised=network.mean(valid, world_size=world_size)
            )
            length, is_held_back = self._length(state, self.strength_at(step=step, epoch=epoch))
            if sharded:
                state = replace(state, own_length=state.own_length.asking(length))
                loss = embedded.surrogate * state.own_length.factor().to(embedded.surrogate.dtype)
            else:
                loss = differentiated(
                    embedded.surrogate, module, length=length, world_size=world_size, means=means
                )
        self._before = self.state
        self.state = state.having_embedded(loss.detach(), is_held_back=is_held_back)
        return loss.nan_to_num(nan=0.0)

    def roll_back(self) -> None:
        """Forget the last :meth:`loss`, which nobody used: the next batch is asked to embed in its place."""
        self.state = self._before

    def coming_steps(self) -> Iterator[int]:
        """Yield the optimizer steps that will embed if bits are missing all along; none before the first has."""
        return self.state.coming_steps(self.cadence)

    def projector(self, device: torch.device, dtype: torch.dtype) -> SignatureProjector:
        """Return the key's tensors on ``device``, derived once."""
        if (
            self._projector is None
            or self._projector.carriers.device != device
            or self._projector.signs.dtype != dtype
        ):
            self._projector = SignatureProjector.from_key(self.key, device=device, dtype=dtype)
        return self._projector

    def state_dict(self) -> dict[str, Any]:
        """Return the state of schedule and cadence as plain types and one tensor that tells nothing about the key."""
        return self.state.to_checkpoint(self.cadence)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave; the buffer fills again from the stream."""
        self.state = self.state.from_checkpoint(state)

    def _note_turns(self, turns: Turns) -> None:
        if turns is not self.state.turns:  # with one optimizer they seldom change, and this is in every batch
            self.state = replace(self.state, turns=turns)

    def _carrier_inputs(
        self, module: nn.Module, logits_fn: LogitsFn, images: Tensor
    ) -> tuple[Tensor, LogitsFn]:
        return carrier_inputs(module, logits_fn, images, self.key.input_shape, self.settings.carrier_layer)

    def _held_to_the_bits(
        self, gradients: Tensor, valid: Tensor, state: EmbeddingState, world_size: int
    ) -> tuple[Tensor, EmbeddingState]:
        """Return the objective of the input gradients, and the state after a look at them.

        Args:
            gradients: of all images, shape ``(n, ...)``.
            valid: which of them count, shape ``(n,)``.
            state: before this step.
            world_size: number of data-parallel ranks.
        """
        weights = valid.to(gradients.dtype)
        projector = self.projector(gradients.device, gradients.dtype)
        rows = projector.directions(gradients) if self.objective.of_directions else projector.raw(gradients)
        mean = global_mean(weights @ rows, weights.sum(), world_size=world_size)
        smoothed, state = state.smoothing(mean, self.settings.momentum)
        held = projector.carrier_gradient(smoothed)
        margins = projector.signs * projector.project(held.detach())
        satisfied = self.objective.satisfied(held.detach(), projector)
        state = state.having_found(margins, asked=getattr(self.objective, "margin", 1.0), satisfied=satisfied)
        # Without an image on any rank there is no gradient and nothing to hold.
        return self.objective(held, projector) * (mean.detach() != 0).any(), state

    def _length(self, state: EmbeddingState, strength: float) -> tuple[Tensor, Tensor | bool]:
        """Return how long the mark's gradient is to be in a step that left this state, and whether less than is missing."""
        assert state.recognised is not None
        assert state.share is not None
        times, is_held_back = urgency(
            self.cadence,
            state.factor,
            recognised=state.recognised,
            share=state.share,
            interval=state.interval(self.cadence, min(state.factor, 1.0)),
            asks_for_margin=hasattr(self.objective, "margin"),
        )
        return strength * times * state.task_gradient.length().to(state.recognised.device), is_held_back


def watermarker_of(
    key: WatermarkKey | Watermarker | str | PathLike[str], settings: EmbeddingSettings
) -> Watermarker:
    """Return the watermarker that was given, or one of the key that was given, or its file.

    Raises:
        ValueError: settings are given beside a watermarker, which has its own; the key cannot be embedded
            with these settings.
    """
    if not isinstance(key, Watermarker):
        return Watermarker(key_of(key), settings)
    if given := [
        field.name
        for field in fields(settings)
        if getattr(settings, field.name) != getattr(DEFAULTS, field.name)
    ]:
        raise ValueError(
            f"`{given[0]}` must not be given beside a `Watermarker`, which has settings of its "
            f"own: {key.settings}."
        )
    return key
