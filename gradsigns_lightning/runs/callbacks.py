"""The callbacks of a run besides the watermark: one measures time, one saves a new key."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from gradsigns_lightning.core.key import WatermarkKey

SECONDS_METRIC = "time/seconds_per_epoch"


class EpochTimer(Callback):
    """Logs the median over epochs of the seconds from the first to the last training batch.

    Validation is left out. The median is logged as a metric, because a Trainer that spawns processes returns
    nothing else.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = self._last = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self._start = self._last = self._now(pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock after the last batch."""
        if trainer.is_last_batch:
            self._last = self._now(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the median so far."""
        self.seconds.append(self._last - self._start)
        pl_module.log(SECONDS_METRIC, statistics.median(self.seconds), sync_dist=trainer.world_size > 1)

    @staticmethod
    def _now(pl_module: Any) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        return time.perf_counter()


class KeyKeeper(Callback):
    """Saves a new key after the first training batch, so that a training that never began leaves none behind.

    Args:
        key: the key.
        file: the file to save it to, unless it exists.
    """

    def __init__(self, key: WatermarkKey, file: Path) -> None:
        self.key = key
        self.file = file

    def keep(self) -> None:
        """Save the key unless its file exists."""
        if not self.file.exists():
            self.key.save(self.file)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the key after the first batch."""
        if trainer.is_global_zero and batch_idx == 0:
            self.keep()
