"""Attributes that every Trainer has but its class does not declare, because Lightning sets them elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return a Trainer's list of callbacks, which may grow while Lightning iterates over it."""
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]


def drop_callbacks(trainer: Trainer, dropped: Sequence[Callback]) -> None:
    """Remove callbacks from a Trainer by a new list, because Lightning may be iterating over the old one."""
    trainer.callbacks = [c for c in callbacks_of(trainer) if not any(c is d for d in dropped)]  # type: ignore[attr-defined]


def is_dev_run(trainer: Trainer) -> bool:
    """Return whether a Trainer only checks that everything runs (``fast_dev_run``)."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
