"""The check of the image shape which a model is built for."""

from __future__ import annotations

from collections.abc import Sequence

from gradsigns_lightning.core.utils.checks import check_int


def check_input_shape(input_shape: Sequence[int]) -> tuple[int, int, int]:
    """Return ``input_shape`` as a tuple ``(C, H, W)`` of positive integers.

    Raises:
        TypeError: a size is not an integer.
        ValueError: there are not three sizes, or one is not positive.
    """
    sizes = tuple(check_int("input_shape", size, minimum=1) for size in input_shape)
    if len(sizes) != 3:
        raise ValueError(f"`input_shape` must be (C, H, W), got {sizes}.")
    return sizes
