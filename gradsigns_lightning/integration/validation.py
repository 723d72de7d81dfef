"""Reads the mark on held-out images while Lightning validates or tests, and logs the figures."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from gradsigns_lightning.core.utils.checks import check_int
from gradsigns_lightning.core.watermarker import Watermarker
from gradsigns_lightning.integration.hooks import Hooks
from gradsigns_lightning.integration.reading import HeldOutEstimator
from gradsigns_lightning.integration.sharding import inside_forward, is_sharded
from gradsigns_lightning.integration.unlogged import unlogged
from gradsigns_lightning.integration.weights import lengths_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class ValidationMonitor:
    """Reads the mark on the class's images in a validation or test, and logs the figures at its end.

    Args:
        name: prefix of the logged names.
        marker: the watermarker.
        n_images: images that are read on each rank; 0 reads none.

    Attributes:
        reader: holds the last reading.

    Raises:
        ValueError: ``n_images`` is out of range.
    """

    def __init__(self, name: str, marker: Watermarker, n_images: int) -> None:
        check_int("n_val_images", n_images, minimum=0)
        self.reader = HeldOutEstimator(marker.key, marker.projector, n_images, marker.settings.carrier_layer)
        self._is_hook_tried = False
        self._name, self._marker = name, marker
        self._is_unreadable = False  # in this fit, which then is not signed either
        self._has_warned = False

    def reset(self) -> None:
        """Forget the readings of an earlier training."""
        self.reader.margins = None
        self._has_warned = False

    def start_fit(self) -> None:
        """Prepare for another module."""
        self._is_hook_tried = self._is_unreadable = False

    def read(self, trainer: Trainer, batch: Any, hooks: Hooks) -> None:
        """Read the class's images of a batch while images are still missing."""
        together = is_sharded(trainer) and self.reader.n_images > 0
        if not (self.reader.wants_more or together) or self._is_unreadable:
            return
        try:
            self._read(trainer, batch, hooks, together=together)
        except Exception as error:
            if self._marker.schedule.strength:
                raise
            self._is_unreadable = True
            warnings.warn(
                f"GradSigns {self._name!r} has strength 0 and does not read this fit either: {error} "
                "(Override `GradSigns.images_and_labels` or `GradSigns.logits`, or set `n_val_images=0`.)",
                UserWarning,
                stacklevel=2,
            )

    def log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was read; NaN where nothing could be."""
        if self.reader.n_images == 0:
            return
        values = None if self._is_unreadable else self.reader.finish(step=trainer.global_step)
        if values is None and not self._is_unreadable and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"GradSigns {self._name!r}: no usable gradient of class {self._marker.key.target_class} in "
                "the validation images (none of that class, or gradients all zero or non-finite), so NaN is "
                "logged.",
                UserWarning,
                stacklevel=2,
            )
        for name, value in (values or self.reader.missing()).items():
            pl_module.log(f"{self._name}/{name}", value, sync_dist=trainer.world_size > 1)

    def _read(self, trainer: Trainer, batch: Any, hooks: Hooks, *, together: bool) -> None:
        images, labels = hooks.extract(batch)
        if trainer.sanity_checking:
            return  # the sanity check should find batches of another form, but logs nothing
        pl_module = hooks.pl_module
        if self.reader.lengths is None and not is_sharded(trainer):
            self.reader.lengths = lengths_of(pl_module)

        def read() -> None:
            if not (self._is_hook_tried or self._marker.is_prepared):  # training has tried it
                hooks.try_logits(images, batch)
                self._is_hook_tried = True
            self.reader.read(pl_module, hooks.logits, images, labels, always=together)

        with unlogged(pl_module):
            inside_forward(trainer, pl_module, read)
