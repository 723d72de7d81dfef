"""Keeps the watermark's forward passes out of a module's logs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


@contextmanager
def unlogged(module: LightningModule) -> Iterator[None]:
    """Keep what a module logs in its ``forward`` out of the task's figures."""
    previous = vars(module).get("log")
    module.log = lambda *_args, **_kwargs: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.log
        if previous is not None:
            module.log = previous  # type: ignore[method-assign]
