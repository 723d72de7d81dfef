"""The callback's two methods that users override, bound to the module at hand and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradsigns_lightning.core.signature import LogitsFn
from gradsigns_lightning.core.watermarker import Watermarker
from gradsigns_lightning.integration.batches import cure
from gradsigns_lightning.integration.hints import check_logits_hook
from gradsigns_lightning.integration.sharding import is_sharded
from gradsigns_lightning.integration.unlogged import unlogged

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


@dataclass(frozen=True)
class Hooks:
    """Gives the mark access to the user's module and batches.

    Attributes:
        pl_module: the module.
        images_and_labels: returns inputs and classes of a batch.
        logits: maps inputs ``(n, C, H, W)`` to logits ``(n, n_classes)``.
        marker: the watermarker, which knows what the key takes.
    """

    pl_module: LightningModule
    images_and_labels: Callable[[Any], tuple[Tensor, Tensor]]
    logits: LogitsFn
    marker: Watermarker

    def extract(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return inputs and classes of a batch.

        Raises:
            TypeError: the batch has another form.
            ValueError: the batch does not fit the key; the message ends with an override if one
                helps.
        """
        images, labels = self.images_and_labels(batch)
        try:
            self.marker.buffer.check(images, labels)
        except ValueError as error:
            any_input = self.marker.settings.carrier_layer is not None
            raise ValueError(
                f"{error}{cure(images, labels, self.marker.key.input_shape, any_input=any_input)}"
            ) from error
        return images, labels

    def try_logits(self, images: Tensor, batch: Any) -> None:
        """Call the logits hook on a few images of a batch.

        Raises:
            ValueError: see :func:`check_logits_hook`.
        """
        with unlogged(self.pl_module):
            check_logits_hook(
                self.pl_module,
                self.logits,
                images,
                batch,
                self.marker.key,
                carrier_layer=self.marker.settings.carrier_layer,
                sharded=is_sharded(self.pl_module.trainer),
            )
