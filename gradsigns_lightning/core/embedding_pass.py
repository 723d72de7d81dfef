"""The embedding pass: from the images and the state before a step to its loss and the state after it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from gradsigns_lightning.core.distributed import global_mean
from gradsigns_lightning.core.dose import Recognition, urgency
from gradsigns_lightning.core.engines import Engine, differentiated
from gradsigns_lightning.core.inputs import carrier_inputs
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.objective import make_objective
from gradsigns_lightning.core.settings import EmbeddingSettings
from gradsigns_lightning.core.signature import LogitsFn, SignatureProjector
from gradsigns_lightning.core.state import EmbeddingState
from gradsigns_lightning.core.torch_state.contexts import frozen_statistics
from gradsigns_lightning.core.torch_state.running_mean import RunningMeans


class EmbeddingPass:
    """Computes the loss of one embedding step. Nothing is remembered here but the key's derived tensors.

    Args:
        key: the owner's key.
        settings: how the key is embedded.

    Attributes:
        objective: what the mean gradient is held to.
        cadence: interval between embedding steps.

    Raises:
        ValueError: the key cannot be embedded with the objective, or there is no objective of that name.
    """

    def __init__(self, key: WatermarkKey, settings: EmbeddingSettings) -> None:
        self.cadence = settings.make_cadence()
        self.objective = make_objective(settings.objective, key)
        self.objective.check_key(key)
        self._key, self._settings = key, settings
        self._projector: SignatureProjector | None = None

    def loss(
        self,
        module: nn.Module,
        logits_fn: LogitsFn,
        engine: Engine,
        images: Tensor,
        valid: Tensor,
        before: EmbeddingState,
        *,
        strength: float,
        world_size: int = 1,
        sharded: bool = False,
    ) -> tuple[Tensor, EmbeddingState]:
        """Return the embedding loss, a scalar, and the state after the step.

        Args:
            module: module whose parameters are trained; its statistics are frozen during the call.
            logits_fn: maps inputs ``(n, C, H, W)`` to logits ``(n, n_classes)``.
            engine: engine that differentiates the objective.
            images: images of the target class, shape ``(n, ...)``.
            valid: which of them count, shape ``(n,)``.
            before: state before the step, which starts at it.
            strength: length of the loss's gradient, in lengths of the task's, before
                :func:`~gradsigns_lightning.core.dose.urgency`.
            world_size: number of data-parallel ranks, all of which must call.
            sharded: parameters are sharded over the ranks; their gradients exist only in the task's own
                backward pass, until which the graph is kept.

        Returns:
            The loss, which is NaN if gradients were non-finite, and the state.
        """
        found: list[EmbeddingState] = []

        def objective(gradients: Tensor) -> Tensor:
            value, after = self._objective_of(gradients, valid, before, world_size)
            found.append(after)
            return value

        with frozen_statistics(module) as training:
            means = RunningMeans(training)
            inputs, logits_fn = self.carrier_inputs(module, logits_fn, images)
            network = Recognition(logits_fn, self._key.target_class)
            with means.followed():
                embedded = engine.embed(module, network, inputs, self._key.target_class, objective)
            state = replace(
                found[-1], value=embedded.value, recognised=network.mean(valid, world_size=world_size)
            )
            length, is_held_back = self._length(state, strength)
            if sharded:
                state = replace(state, own_length=state.own_length.asking(length))
                loss = embedded.surrogate * state.own_length.factor().to(embedded.surrogate.dtype)
            else:
                loss = differentiated(
                    embedded.surrogate, module, length=length, world_size=world_size, means=means
                )
        return loss, state.having_embedded(loss.detach(), is_held_back=is_held_back)

    def carrier_inputs(
        self, module: nn.Module, logits_fn: LogitsFn, images: Tensor
    ) -> tuple[Tensor, LogitsFn]:
        """Return the tensor that carries the mark, and the logits as a function of it.

        See :func:`~gradsigns_lightning.core.inputs.carrier_inputs`.
        """
        return carrier_inputs(module, logits_fn, images, self._key.input_shape, self._settings.carrier_layer)

    def projector(self, device: torch.device, dtype: torch.dtype) -> SignatureProjector:
        """Return the key's tensors on ``device``, derived once."""
        if (
            self._projector is None
            or self._projector.carriers.device != device
            or self._projector.signs.dtype != dtype
        ):
            self._projector = SignatureProjector.from_key(self._key, device=device, dtype=dtype)
        return self._projector

    def _objective_of(
        self, gradients: Tensor, valid: Tensor, state: EmbeddingState, world_size: int
    ) -> tuple[Tensor, EmbeddingState]:
        """Return the objective of the input gradients, and the state with its findings.

        Args:
            gradients: input gradients of all images, shape ``(n, ...)``.
            valid: which images count, shape ``(n,)``.
            state: state before this step.
            world_size: number of data-parallel ranks.
        """
        weights = valid.to(gradients.dtype)
        projector = self.projector(gradients.device, gradients.dtype)
        rows = projector.directions(gradients) if self.objective.of_directions else projector.raw(gradients)
        mean = global_mean(weights @ rows, weights.sum(), world_size=world_size)
        smoothed, state = state.smoothing(mean, self._settings.momentum)
        carried = projector.carrier_gradient(smoothed)
        margins = projector.signs * projector.project(carried.detach())
        satisfied = self.objective.satisfied(carried.detach(), projector)
        state = state.having_found(margins, asked=getattr(self.objective, "margin", 1.0), satisfied=satisfied)
        # Without an image on any rank there is no gradient, and nothing to embed.
        return self.objective(carried, projector) * (mean.detach() != 0).any(), state

    def _length(self, state: EmbeddingState, strength: float) -> tuple[Tensor, Tensor | bool]:
        """Return the length for the mark's gradient after a step's findings, and whether it is held back."""
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
