"""What a thief has: images, a recipe, and marks of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from gradsigns_lightning.attacks.base import AttackData, Recipe
from gradsigns_lightning.attacks.own_marks import OwnMark
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.watermarker import Watermarker


def thief_of(data: Any, recipe: Recipe, *, share: float, n_bits: int) -> AttackData:
    """Return what a thief has who holds a share of the training images and this package.

    Args:
        data: the data module on which the owner trained.
        recipe: how networks are trained on it.
        share: share of the training images, in (0, 1].
        n_bits: bits of the thief's own keys, as many as the owner's.

    Raises:
        ValueError: ``share`` leaves no image.
    """
    thief = AttackData.of(data, recipe, share=share)
    return replace(thief, make_mark=_MarkMaker(tuple(data.input_shape), data.mean, data.std, n_bits))


@dataclass(frozen=True)
class _MarkMaker:
    """Makes marks with the default settings; a class and a number always give the same key."""

    input_shape: tuple[int, ...]
    input_mean: Sequence[float]
    input_std: Sequence[float]
    n_bits: int

    def __call__(self, target_class: int, number: int) -> OwnMark:
        secret = hashlib.sha256(f"thief, class {target_class}, key {number}".encode()).digest()
        key = WatermarkKey.generate(
            "thief",
            self.n_bits,
            input_shape=self.input_shape,
            target_class=target_class,
            input_mean=self.input_mean,
            input_std=self.input_std,
            secret=secret,
        )
        return _ThiefsMark(Watermarker(key))


@dataclass(frozen=True)
class _ThiefsMark:
    """A key of the thief's, embedded as this package does."""

    watermarker: Watermarker

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor | None:
        return self.watermarker.step(model, model, x, y, step=step)

    def before_step(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        self.watermarker.observe_gradients(0, parameters, step=step)
