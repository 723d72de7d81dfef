"""What the command line watches while a Trainer fits: the time, and a line per epoch where no bar can be drawn."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich.console import Console
from rich.text import Text

from gradsigns_lightning.cli.quiet import silence
from gradsigns_lightning.cli.report import in_sweep
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.utils.text import printable

SECONDS_METRIC = "time/seconds_per_epoch"


class EpochTimer(Callback):
    """Logs the median over epochs of the seconds from the first to the last training batch, validation left out.

    It is logged as a metric, because a Trainer that spawns processes brings nothing else back.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = self._last = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self._start = self._last = self._now(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
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


class EpochLines(Callback):
    """Prints one line per epoch, for output that goes to a file.

    Args:
        phase: what is being done.
    """

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Print the epoch's figures."""
        if not trainer.is_global_zero:
            return
        shown = {"train/loss": "loss", "val/acc": "val/acc", "wm/ber": "wm/ber"}
        metrics = trainer.callback_metrics
        values = [f"{label} {metrics[name]:.3f}" for name, label in shown.items() if name in metrics]
        line = f"{self.phase}: epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {'  '.join(values)}"
        Console(highlight=False).print(Text(printable(line)), soft_wrap=True)


class KeyKeeper(Callback):
    """Saves a new key when the first batch was trained, so that a training that never began leaves none behind.

    Args:
        key: the key.
        file: where it is saved unless it is there.
    """

    def __init__(self, key: WatermarkKey, file: Path) -> None:
        self.key = key
        self.file = file

    def keep(self) -> None:
        """Save the key unless its file is there."""
        if not self.file.exists():
            self.key.save(self.file)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save the key after the first batch."""
        if trainer.is_global_zero and batch_idx == 0:
            self.keep()


class QuietWorkers(Callback):
    """Carries the silence into processes that a Trainer spawns, by being unpickled there."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        silence()
        self.__dict__.update(state)

    def __reduce__(self) -> tuple[Any, ...]:
        return QuietWorkers, (), {"quiet": True}


def progress_callbacks(phase: str, *, progress: bool) -> list[Callback]:
    """Return a bar for a terminal, lines for anything else but a sweep's output, nothing if not wanted."""
    if not progress:
        return []
    if Console().is_terminal:
        return [RichProgressBar(leave=False)]
    return [] if in_sweep() else [EpochLines(phase)]
