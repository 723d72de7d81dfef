"""Reads the mark at the end of a fit, after all other callbacks, because some of them replace the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from gradsigns_lightning.core.signature import LogitsFn
from gradsigns_lightning.core.watermarker import Watermarker
from gradsigns_lightning.integration.reading import HeldOutEstimator
from gradsigns_lightning.integration.sharding import is_sharded
from gradsigns_lightning.integration.standing import Standing, final_standing, last_reading, report
from gradsigns_lightning.integration.undeclared import callbacks_of, drop_callbacks
from gradsigns_lightning.integration.weights import are_weights_of, lengths_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class FinalReading:
    """Reports how the mark stands in the weights that the user gets.

    Args:
        name: prefix of the logged names.
        reader: holds the last reading on held-out images.
        marker: the watermarker.
    """

    def __init__(self, name: str, reader: HeldOutEstimator, marker: Watermarker) -> None:
        self._name, self._reader, self._marker = name, reader, marker
        self.start()

    def start(self) -> None:
        """Forget the last fit."""
        self.standing: Standing | None = None
        self._lengths: Tensor | None = None

    def read_after_other_callbacks(self, trainer: Trainer, logits_fn: LogitsFn) -> None:
        """Read once the ``on_train_end`` of all callbacks has run; to be called from that hook.

        Lightning iterates over the Trainer's own list, so it may grow meanwhile.
        """
        callbacks_of(trainer).append(_Afterwards(self, logits_fn))

    def read(self, trainer: Trainer, pl_module: LightningModule, logits_fn: LogitsFn) -> None:
        """Read the mark; all ranks must call."""
        self.standing = final_standing(trainer, pl_module, logits_fn, self._reader, self._marker)
        self._lengths = None if is_sharded(trainer) else lengths_of(pl_module)

    def report(self, trainer: Trainer, pl_module: LightningModule, logits_fn: LogitsFn) -> None:
        """Report how the mark stands.

        It is read again if the module's own ``on_train_end``, which runs last, replaced the weights.
        """
        if self._lengths is not None and not are_weights_of(self._lengths, pl_module):
            if trainer.world_size == 1:
                self.read(trainer, pl_module, logits_fn)
            elif self.standing is not None:  # the process group may be gone
                self.standing = replace(self.standing, replaced=True)
        report(trainer, self._name, self.standing)

    def stop(self, trainer: Trainer, exception: BaseException) -> None:
        """Cancel the reading of a fit that failed, and report the last one if the user interrupted it.

        Nothing new is read, because other ranks may be anywhere in the fit.
        """
        drop_callbacks(trainer, [c for c in callbacks_of(trainer) if isinstance(c, _Afterwards)])
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":
            self.standing = last_reading(trainer, self._reader, self._marker)
            report(trainer, self._name, self.standing)


class _Afterwards(Callback):
    def __init__(self, end: FinalReading, logits_fn: LogitsFn) -> None:
        self._end, self._logits_fn = end, logits_fn

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        drop_callbacks(trainer, [self])
        self._end.read(trainer, pl_module, self._logits_fn)
