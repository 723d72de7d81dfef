"""The watermark in a Fabric loop, without a Trainer."""

from __future__ import annotations

import weakref
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from gradsigns_lightning.core.dose import parameters_of
from gradsigns_lightning.core.key import WatermarkKey, key_of
from gradsigns_lightning.core.settings import EmbeddingSettings
from gradsigns_lightning.core.signature import LogitsFn
from gradsigns_lightning.core.trained import only_trained
from gradsigns_lightning.core.watermarker import Watermarker
from gradsigns_lightning.integration.compat import check_module

SUPPORTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


class FabricGradSigns:
    """Signs a model in a loop of one's own: add :meth:`loss` to the task's loss before ``fabric.backward``.

    Has ``state_dict`` and ``load_state_dict``, so it can be put into the state that ``fabric.save`` and ``fabric.load`` take.

    Args:
        fabric: the launched Fabric; on one device or with DDP.
        key: the owner's key, or its file.
        settings: ``strength``, ``objective``, ``engine``, ``cadence``, ``n_images``, ``momentum`` and ``carrier_layer`` as in
            :class:`~gradsigns_lightning.GradSigns`.

    Raises:
        ValueError: the strategy is not supported, or a setting is out of range.

    Example:
        >>> from lightning.fabric import Fabric
        >>> key = WatermarkKey.generate("Acme Vision", 32, input_shape=(1, 8, 8), target_class=3)
        >>> watermark = FabricGradSigns(Fabric(accelerator="cpu", devices=1), key)
        >>> # loss = task_loss + watermark.loss(model, images, labels, step=step, epoch=epoch); fabric.backward(loss)
    """

    def __init__(self, fabric: Any, key: WatermarkKey | str | PathLike[str], **settings: Any) -> None:
        name = type(fabric.strategy).__name__
        if name not in SUPPORTED_STRATEGIES:
            raise ValueError(f"`fabric` must use one of {', '.join(SUPPORTED_STRATEGIES)} (parameters not sharded), got {name}.")
        self.fabric = fabric
        self.watermarker = Watermarker(key_of(key), EmbeddingSettings(**settings))
        self._prepared = False
        self._step = 0
        self._parameters: set[nn.Parameter] = set()
        self._optimizers: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        # Fabric's loop has no hook between the task's backward pass and the step, and optimizers are not known here.
        this = weakref.ref(self)
        hook = register_optimizer_step_pre_hook(lambda optimizer, *_: _note(this(), optimizer))
        weakref.finalize(self, hook.remove)

    def loss(
        self, module: nn.Module, images: Tensor, labels: Tensor, *, step: int, epoch: int = 0, logits: LogitsFn | None = None
    ) -> Tensor:
        """Return the embedding loss, a scalar; 0 on steps that do not embed.

        Its gradient has ``strength`` times the length of the task's, as the optimizers' last steps had it.

        Args:
            module: what ``fabric.setup`` returned.
            images: the batch's normalised inputs, shape ``(n, C, H, W)``.
            labels: class indices, shape ``(n,)``.
            step: optimizer step; with gradient accumulation call once a step, for its first batch.
            epoch: epoch, for schedules that start late.
            logits: maps inputs to logits; by default the module itself. Use the network that was given to ``fabric.setup`` in
                it, not what came back, which counts forward passes and casts.

        Raises:
            ValueError: the batch does not fit the key, or no engine works on this model.
        """
        marker, world_size = self.watermarker, self.fabric.world_size
        # Fabric's wrapper would redirect to the strategy's forward, which has had its one call for this backward pass.
        original = getattr(module, "module", module) if hasattr(module, "_forward_module") else module
        logits_fn = logits or original
        zero = torch.zeros((), device=images.device)
        if marker.schedule.strength == 0:
            return zero
        self._step = step
        marker.observe(images, labels, step=step)
        if not self._prepared:
            check_module(original, marker)
            self._parameters = set(original.parameters())
            marker.prepare(original, logits_fn, images, world_size=world_size)
            self._prepared = True
        if not marker.is_due(step=step, epoch=epoch):
            return zero
        with only_trained(original, self._optimizers):
            return marker.loss(original, logits_fn, step=step, epoch=epoch, world_size=world_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of schedule, cadence and mean gradient."""
        return self.watermarker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.watermarker.load_state_dict(state)


def _note(watermark: FabricGradSigns | None, optimizer: Optimizer) -> None:
    if watermark is None:
        return
    known = watermark._optimizers
    if optimizer not in known:
        if watermark._parameters.isdisjoint(parameters_of(optimizer)):
            return
        known[optimizer] = len(known)
    watermark.watermarker.observe_gradients(known[optimizer], parameters_of(optimizer), step=watermark._step)
