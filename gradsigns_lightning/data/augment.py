"""Random shifts and flips of a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsigns_lightning.core.utils.checks import check_instance, check_number


class ShiftFlip:
    """Random shift and random horizontal flip, drawn for every sample on its own.

    The shift is a whole number of pixels, at most ``shift`` times the height (or width), rounded down; the
    uncovered edge repeats the nearest pixel. These are the ranges and the default ``fill_mode="nearest"`` of
    the Keras augmentation in the ResNet-20 recipe that the GradSigns paper (Aramoon et al., MLSys 2021)
    follows; Keras also draws fractions of a pixel. The draws come from torch's default generator.

    Args:
        shift: largest shift as a share of height and width, in ``[0, 1]``.
        flip: whether each sample is mirrored left to right with probability one half.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``shift`` is out of its range.
    """

    def __init__(self, shift: float = 0.1, flip: bool = True) -> None:
        self.shift = check_number("shift", shift, minimum=0.0, maximum=1.0)
        check_instance("flip", flip, bool)
        self.flip = flip

    def __call__(self, batch: Tensor) -> Tensor:
        """Return the augmented ``batch``: any dtype, shape ``(n, C, H, W)``, both kept."""
        n, channels, height, width = batch.shape
        rows, columns = self._positions(n, height), self._positions(n, width)
        if self.flip:
            mirrored = torch.rand(n) < 0.5
            columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
        flat = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, height * width)
        moved = batch.flatten(2).gather(2, flat.expand(-1, channels, -1).to(batch.device))
        return moved.view_as(batch)

    def __repr__(self) -> str:
        return f"ShiftFlip(shift={self.shift}, flip={self.flip})"

    def _positions(self, n: int, size: int) -> Tensor:
        # The small term keeps a product such as 0.29 * 100 from losing a whole pixel to rounding.
        most = int(self.shift * size + 1e-9)
        offsets = torch.randint(-most, most + 1, (n, 1))
        return (torch.arange(size) + offsets).clamp_(0, size - 1)
