"""Keeps the frameworks' advice off the terminal."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gradsigns_lightning.cli.terminal import for_stream
from gradsigns_lightning.core.utils.text import printable_lines
from gradsigns_lightning.runs.options import spoken, without_overrides

# Arguments that the callback's warnings name, as settings of `gradsigns train`.
_SETTINGS = {
    name: f"watermark.{name}"
    for name in ("strength", "cadence", "n_images", "n_val_images", "engine", "objective")
}
_SETTINGS |= {"start_epoch": "watermark.strength.start_epoch"}
_SETTINGS |= {
    name: f"trainer.{name}" for name in ("max_epochs", "max_steps", "max_time", "gradient_clip_val")
}
_LIGHTNING = ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


@contextmanager
def quiet() -> Iterator[None]:
    """Show this package's own warnings only, each in one line."""
    with warnings.catch_warnings():
        silence()
        yield


def silence() -> None:
    """Do what :func:`quiet` does, permanently."""
    # Where both of Lightning's packages are imported, either one logs under the other's name; urllib3
    # repeats what servers write.
    for name in (*_LIGHTNING, "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"gradsigns_lightning\.")
    # A new key's warning is attributed to its caller, which is Hydra where a configuration makes the key.
    warnings.filterwarnings("default", message=r"A key of \d+ bits can never be", category=UserWarning)
    warnings.showwarning = _show


class PrintableFormatter(logging.Formatter):
    """Makes Hydra's own lines printable.

    In a sweep they repeat the command line, in which a file's name may be a stranger's choice.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line as :func:`printable_lines`, wrapped for a terminal."""
        return for_stream(printable_lines(super().format(record).expandtabs(2)), sys.stdout)


def _show(message: Any, *_: Any, **__: Any) -> None:
    told = str(message)
    told = (
        spoken(without_overrides(told), _SETTINGS)
        if told.startswith("GradSigns ")
        else without_overrides(told)
    )
    print(for_stream(f"warning: {printable_lines(told)}", sys.stderr), file=sys.stderr)  # noqa: T201
