"""Adds the embedding loss to the training steps of a fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from gradsigns_lightning.core.dose import parameters_of
from gradsigns_lightning.core.watermarker import Watermarker
from gradsigns_lightning.integration.evaluations import Evaluations
from gradsigns_lightning.integration.hooks import Hooks
from gradsigns_lightning.integration.input_watch import InputWatch
from gradsigns_lightning.integration.sharding import is_sharded
from gradsigns_lightning.integration.step_patch import StepWrapper
from gradsigns_lightning.integration.unlogged import unlogged

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class SignedStep:
    """Makes a module's training step sign it, in an optimizer step that embeds.

    Args:
        marker: the watermarker.
    """

    def __init__(self, marker: Watermarker) -> None:
        self._marker = marker
        self._wrapper = StepWrapper()
        self._watch = InputWatch()
        self._evaluations = Evaluations(marker)

    def start(self) -> None:
        """Forget the last fit."""
        self._evaluations.start()

    def wrap(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        loss_of: Callable[[Trainer, LightningModule, Any], Tensor | None],
    ) -> None:
        """Add ``loss_of`` to what the module's training step returns, until :meth:`stop` is called."""

        def extra_loss(batch: Any) -> Tensor | None:
            if not trainer.training:
                return None  # a validation step that calls the training step
            loss = loss_of(trainer, pl_module, batch)
            self._watch.watch_the_step()
            return loss

        self._wrapper.wrap(pl_module, extra_loss, self._evaluations.roll_back)

    def loss(self, trainer: Trainer, hooks: Hooks, batch: Any, *, name: str) -> Tensor | None:
        """Return the embedding loss if this batch opens an optimizer step that embeds, else None.

        Its value is logged as ``name/loss``.
        """
        marker, pl_module, step = self._marker, hooks.pl_module, trainer.global_step
        if marker.schedule.strength == 0:
            return None
        images, labels = hooks.extract(batch)
        self._evaluations.begin(
            images, step, only=pl_module.automatic_optimization and trainer.accumulate_grad_batches == 1
        )
        if not marker.is_prepared:
            self._watch = InputWatch(pl_module)
            with self._watch.recording():
                hooks.try_logits(images, batch)
        with unlogged(pl_module):
            loss = marker.step(
                pl_module,
                hooks.logits,
                images,
                labels,
                step=step,
                epoch=trainer.current_epoch,
                world_size=trainer.world_size,
                sharded=is_sharded(trainer),
                optimizers=trainer.optimizers,
            )
        if loss is None or marker.state.value is None:
            return None
        self._evaluations.embedded(step)
        pl_module.log(f"{name}/loss", marker.state.value, on_step=True, on_epoch=False)
        return loss * trainer.accumulate_grad_batches if pl_module.automatic_optimization else loss

    def before_optimizer_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Observe the task's gradient, which is whole, unscaled and not clipped yet."""
        self._evaluations.stepped()
        if self._marker.is_prepared:
            which = next((i for i, known in enumerate(trainer.optimizers) if known is optimizer), 0)
            step, sharded = trainer.global_step, is_sharded(trainer)
            self._marker.observe_gradients(which, parameters_of(optimizer), step=step, sharded=sharded)

    def close_batch(self) -> None:
        """Note that the batch is over."""
        self._watch.stop()
        self._marker.close_batch()  # the next one may not call `watermark_loss`

    def renew(self) -> None:
        """Wrap the step again if the module replaced it."""
        self._wrapper.renew()

    def stop(self) -> None:
        """Leave the module's step as it was."""
        self._evaluations.stop()
        self._watch.stop()
        self._wrapper.remove()
