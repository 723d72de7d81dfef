"""The watermarker: embedding without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsigns_lightning.core.buffer import TargetBuffer
from gradsigns_lightning.core.distributed import all_ranks_agree
from gradsigns_lightning.core.embedding_pass import EmbeddingPass
from gradsigns_lightning.core.engines import check_engine, make_engines
from gradsigns_lightning.core.engines.checking import N_IMAGES
from gradsigns_lightning.core.key import WatermarkKey
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
        settings: how the key is embedded.

    Attributes:
        state: everything that is remembered from step to step.
        is_prepared: whether the engine was chosen for the model in training; set it to False before another
            model is trained.
        engine: engine that differentiates the objective.

    Raises:
        ValueError: the key cannot be embedded with the objective, or there is no objective or engine of that
            name.
    """

    def __init__(self, key: WatermarkKey, settings: EmbeddingSettings = DEFAULTS) -> None:
        check_instance("key", key, WatermarkKey)
        self.key = key
        self.settings = settings
        self.schedule = settings.make_schedule()
        self._pass = EmbeddingPass(key, settings)
        self.cadence, self.objective = self._pass.cadence, self._pass.objective
        self.engines = make_engines(settings.engine)
        self.engine = self.engines[0]
        # With a carrier layer the inputs may have any shape; the layer's output is checked later.
        input_shape = key.input_shape if settings.carrier_layer is None else None
        self.buffer = TargetBuffer(settings.n_images, key.target_class, input_shape)
        self.is_prepared = False
        self.reset()

    def reset(self) -> None:
        """Forget the steps, interval, mean gradient and images of earlier training."""
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
        """Observe the first batch of an optimizer step, and return the loss if the step embeds, else None.

        Between embedding steps nothing is computed. Call :meth:`observe_gradients` before every optimizer
        step.

        Args:
            module: module whose parameters are trained.
            logits_fn: maps inputs ``(n, C, H, W)`` to logits ``(n, n_classes)``.
            images: the batch's inputs, floating point, shape ``(n, C, H, W)``.
            labels: class indices, shape ``(n,)``.
            step: optimizer step.
            epoch: epoch.
            world_size: number of data-parallel ranks, all of which must call.
            sharded: parameters are sharded over the ranks.
            optimizers: the training's optimizers; parameters that none of them steps are treated as frozen.

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

        Only the last batches before the next embedding step are used; the others cost nothing. A step below
        the last one begins another training.

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
            self.state = self.state.settled(self.cadence)  # only once, because it waits for the device

    def observe_gradients(
        self, optimizer: int, parameters: Iterable[nn.Parameter], *, step: int, sharded: bool = False
    ) -> None:
        """Observe the task's gradient before optimizer step ``step``, if the next embedding step is near.

        Args:
            optimizer: index of the optimizer.
            parameters: the optimizer's parameters; their gradients must be neither scaled nor clipped.
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
        """Note that the batch is over: where optimizers take turns, :meth:`step` may not see the next one."""
        self._note_turns(self.state.turns.closing())

    def strength_at(self, *, step: int, epoch: int) -> float:
        """Return the strength of the embedding loss at an optimizer step."""
        first = self.state.first_step
        return self.schedule.at(epoch=epoch, steps_since_start=0 if first is None else step - first)

    def is_due(self, *, step: int, epoch: int) -> bool:
        """Return whether optimizer step ``step`` of ``epoch`` embeds; the same on all ranks."""
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
        """Try the engines on a few images before training, and take the first that works on every rank.

        Args:
            module: module whose parameters are trained.
            logits_fn: maps inputs ``(n, C, H, W)`` to logits ``(n, n_classes)``.
            images: inputs of the first batch, of any class.
            world_size: number of data-parallel ranks, all of which must call.
            sharded: parameters are sharded over the ranks.

        Raises:
            ValueError: no engine works; the message says why for each of them.
        """
        problems = []
        warn_of_lag(module)
        if self.settings.carrier_layer is None:
            warn_of_scale(images, self.key)
        with frozen_statistics(module) as training, RunningMeans(training).followed():
            inputs, logits_fn = self._pass.carrier_inputs(module, logits_fn, images[:N_IMAGES])
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

        It is scaled so that its gradient has ``strength`` times the length of the task's, times
        :func:`~gradsigns_lightning.core.dose.urgency`. Its gradients are computed here and only passed on by
        its ``backward()``; no graph of the network stays in memory.

        Args:
            module: module whose parameters are trained; its statistics are frozen during the call.
            logits_fn: maps inputs ``(n, C, H, W)`` to logits ``(n, n_classes)``.
            step: optimizer step.
            epoch: epoch.
            world_size: number of data-parallel ranks, all of which must call.
            sharded: parameters are sharded over the ranks; their gradients exist only in the task's own
                backward pass, until which the graph is kept.
        """
        images, valid = self.buffer.images, self.buffer.valid
        assert images is not None, "observe() comes before loss()"
        assert valid is not None, "observe() comes before loss()"
        loss, state = self._pass.loss(
            module,
            logits_fn,
            self.engine,
            images,
            valid,
            self.state.settled(self.cadence).starting_at(step),
            strength=self.strength_at(step=step, epoch=epoch),
            world_size=world_size,
            sharded=sharded,
        )
        self._before, self.state = self.state, state
        return loss.nan_to_num(nan=0.0)

    def roll_back(self) -> None:
        """Roll back the last :meth:`loss`, which was not used: the next batch embeds in its place."""
        self.state = self._before

    def coming_steps(self) -> Iterator[int]:
        """Yield the steps that will embed if bits stay missing; none before the first embedding step."""
        return self.state.coming_steps(self.cadence)

    def projector(self, device: torch.device, dtype: torch.dtype) -> SignatureProjector:
        """Return the key's tensors on ``device``, derived once."""
        return self._pass.projector(device, dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types and one tensor that reveals nothing of the key."""
        return self.state.to_checkpoint(self.cadence)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the buffer fills again from the stream."""
        self.state = self.state.from_checkpoint(state)

    def _note_turns(self, turns: Turns) -> None:
        if turns is not self.state.turns:  # called in every batch, and one optimizer's turns seldom change
            self.state = replace(self.state, turns=turns)
