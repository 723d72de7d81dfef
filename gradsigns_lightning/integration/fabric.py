"""The watermark in a Fabric loop, without a Trainer."""

from __future__ import annotations

import weakref
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from gradsigns_lightning.core.dose import parameters_of
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.opening import watermarker_of
from gradsigns_lightning.core.settings import EmbeddingSettings
from gradsigns_lightning.core.signature import LogitsFn
from gradsigns_lightning.core.watermarker import Watermarker
from gradsigns_lightning.integration.compat import check_module

if TYPE_CHECKING:
    from lightning.fabric import Fabric

SUPPORTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


class FabricGradSigns:
    """Signs a model in a Fabric loop: add :meth:`loss` to the task's loss before ``fabric.backward``.

    Has ``state_dict`` and ``load_state_dict``, so it can be put into the state that ``fabric.save`` and
    ``fabric.load`` take.

    Args:
        fabric: the launched Fabric, on one device or with DDP.
        key: the owner's key, or its file, or a :class:`Watermarker`.
        settings: how a key is embedded: ``strength``, ``objective``, ``engine``, ``cadence``, ``n_images``,
            ``momentum`` and ``carrier_layer`` as in :class:`~gradsigns_lightning.GradSigns`.

    Raises:
        ValueError: the strategy is not supported, or a setting is out of range.

    Example:
        >>> from lightning.fabric import Fabric
        >>> key = WatermarkKey.generate("Acme Vision", 32, input_shape=(1, 8, 8), target_class=3)
        >>> watermark = FabricGradSigns(Fabric(accelerator="cpu", devices=1), key)
        >>> # loss = task_loss + watermark.loss(model, images, labels, step=step, epoch=epoch)
        >>> # fabric.backward(loss)
    """

    def __init__(
        self, fabric: Fabric, key: WatermarkKey | Watermarker | str | PathLike[str], **settings: Any
    ) -> None:
        name = type(fabric.strategy).__name__
        if name not in SUPPORTED_STRATEGIES:
            raise ValueError(
                f"`fabric` must use one of {', '.join(SUPPORTED_STRATEGIES)} (parameters not sharded), got "
                f"{name}."
            )
        self.fabric = fabric
        self.watermarker = watermarker_of(key, EmbeddingSettings(**settings))
        self.watermarker.is_prepared = False
        self._step = 0
        self._parameters: set[nn.Parameter] = set()
        self._optimizers: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        # A Fabric loop has no hook between the task's backward pass and the step, and does not name its
        # optimizers here.
        this = weakref.ref(self)

        def note(optimizer: Optimizer, *_: Any) -> None:
            if (watermark := this()) is not None:
                watermark._note(optimizer)

        hook = register_optimizer_step_pre_hook(note)
        weakref.finalize(self, hook.remove)

    def loss(
        self,
        module: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        step: int,
        epoch: int = 0,
        logits: LogitsFn | None = None,
    ) -> Tensor:
        """Return the embedding loss, a scalar; 0 on steps that do not embed.

        Its gradient is ``strength`` times as long as the task's in the optimizers' last steps.

        Args:
            module: what ``fabric.setup`` returned.
            images: the batch's normalized inputs, shape ``(n, C, H, W)``.
            labels: class indices, shape ``(n,)``.
            step: optimizer step; with gradient accumulation call once per step, for its first batch.
            epoch: epoch, for schedules that start late.
            logits: maps inputs to logits; by default the module itself. It must call the network that was
                passed to ``fabric.setup``, not the wrapper that came back, which counts forward passes and
                casts.

        Raises:
            ValueError: the batch does not fit the key, or no engine works on this model.
        """
        # Fabric's wrapper would call the strategy's forward, which may run only once per backward pass.
        original = getattr(module, "module", module) if hasattr(module, "_forward_module") else module
        self._step = step
        if self.watermarker.schedule.strength and not self.watermarker.is_prepared:
            self.watermarker.buffer.check(images, labels)
            check_module(original, self.watermarker)
            self._parameters = set(original.parameters())
        loss = self.watermarker.step(
            original,
            logits or original,
            images,
            labels,
            step=step,
            epoch=epoch,
            world_size=self.fabric.world_size,
            optimizers=self._optimizers,
        )
        return torch.zeros((), device=images.device) if loss is None else loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of schedule, cadence and mean gradient."""
        return self.watermarker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.watermarker.load_state_dict(state)

    def _note(self, optimizer: Optimizer) -> None:
        if optimizer not in self._optimizers:
            if self._parameters.isdisjoint(parameters_of(optimizer)):
                return
            self._optimizers[optimizer] = len(self._optimizers)
        self.watermarker.observe_gradients(
            self._optimizers[optimizer], parameters_of(optimizer), step=self._step
        )
