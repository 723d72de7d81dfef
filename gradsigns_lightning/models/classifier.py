"""The Lightning module that the command line trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torchmetrics.classification import MulticlassAccuracy

from gradsigns_lightning.core.utils.checks import check_choice, check_instance, check_int, check_number

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
LR_SCHEDULES = ("constant", "onecycle", "steps")
# Keras' ResNet example lowers the rate after these epochs (counted from 0) to these shares of the base rate.
_STEPS = ((180, 0.5e-3), (160, 1e-3), (120, 1e-2), (80, 1e-1))


class Classifier(LightningModule):
    """Trains a network with cross-entropy on batches ``(x, y)`` and logs loss and accuracy.

    Logs ``train/loss``, ``val/loss``, ``val/acc``, ``test/loss`` and ``test/acc``.

    Args:
        net: maps inputs ``(n, C, H, W)`` to logits ``(n, n_classes)``.
        n_classes: number of classes, >= 2.
        optimizer: makes the optimizer from the parameters, for example
            ``functools.partial(torch.optim.Adam, lr=1e-3)``; by default AdamW with rate 3e-3 and weight decay
            1e-4.
        lr_schedule: ``"onecycle"`` (up to the optimizer's rate and down again, over the whole fit),
            ``"constant"``, or ``"steps"`` (a tenth after epoch 80, a hundredth after 120, ... as in Keras'
            ResNet example).
        label_smoothing: share of every training target that is spread over all classes, in [0, 1]; keeps the
            network from becoming so confident on its training images that their gradients vanish.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        net: nn.Module,
        n_classes: int,
        *,
        optimizer: OptimizerFactory | None = None,
        lr_schedule: str = "onecycle",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_instance("net", net, nn.Module)
        check_int("n_classes", n_classes, minimum=2)
        check_choice("lr_schedule", lr_schedule, LR_SCHEDULES)
        if optimizer is not None and not callable(optimizer):
            raise TypeError(
                f"`optimizer` must be a callable that makes an optimizer from parameters, got {optimizer!r}."
            )
        self.net = net
        self.lr_schedule = lr_schedule
        self.label_smoothing = check_number("label_smoothing", label_smoothing, minimum=0, maximum=1)
        self._make_optimizer = optimizer or _adamw
        self.val_acc = MulticlassAccuracy(n_classes, average="micro")
        self.test_acc = MulticlassAccuracy(n_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(n, n_classes)`` of inputs ``(n, C, H, W)``."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on a validation batch."""
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on a test batch."""
        self._evaluate(batch, "test", self.test_acc)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its learning-rate schedule."""
        optimizer = self._make_optimizer(self.parameters())
        if self.lr_schedule == "constant":
            return optimizer
        schedule: LRScheduler
        if self.lr_schedule == "onecycle":
            schedule, interval = self._one_cycle(optimizer), "step"
        else:
            schedule, interval = LambdaLR(optimizer, _step_factor), "epoch"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

    def _one_cycle(self, optimizer: Optimizer) -> OneCycleLR:
        total = self.trainer.estimated_stepping_batches
        if total != int(total):
            raise ValueError(
                "`lr_schedule` 'onecycle' needs a Trainer with `max_epochs` or `max_steps`; take 'constant'."
            )
        has_momentum = "betas" in optimizer.defaults or optimizer.defaults.get("momentum", 0) > 0
        rates = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, rates, total_steps=int(total), cycle_momentum=has_momentum)

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(
            f"{split}/loss",
            F.cross_entropy(logits, labels),
            on_step=False,
            on_epoch=True,
            sync_dist=self._distributed,
        )
        self.log(f"{split}/acc", accuracy, on_step=False, on_epoch=True, prog_bar=True)

    @property
    def _distributed(self) -> bool:
        return self.trainer.world_size > 1


def _adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-4)


def _step_factor(epoch: int) -> float:
    return next((factor for last, factor in _STEPS if epoch > last), 1.0)
