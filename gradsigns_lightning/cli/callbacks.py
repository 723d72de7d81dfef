"""What the command line shows while a Trainer fits: a bar, or a line per epoch where no bar can be drawn."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich.console import Console
from rich.text import Text

from gradsigns_lightning.cli.quiet import silence
from gradsigns_lightning.cli.tables import in_sweep
from gradsigns_lightning.core.utils.text import printable


class EpochLines(Callback):
    """Prints one line per epoch, for output that goes to a file.

    Args:
        phase: what is being trained, printed at the start of each line.
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


class QuietWorkers(Callback):
    """Silences the processes that a Trainer spawns, when it is unpickled there."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        silence()
        self.__dict__.update(state)

    def __reduce__(self) -> tuple[Any, ...]:
        return QuietWorkers, (), {"quiet": True}


def progress_callbacks(phase: str, *, progress: bool) -> list[Callback]:
    """Return a bar for a terminal, elsewhere lines except in a sweep; nothing without ``progress``."""
    if not progress:
        return []
    if Console().is_terminal:
        return [RichProgressBar(leave=False)]
    return [] if in_sweep() else [EpochLines(phase)]
