"""Checks of a key's parameters; a received key's are checked before anything is derived from them."""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any

from gradsigns_lightning.core.key.reach import least_bits
from gradsigns_lightning.core.utils.checks import check_instance, check_int, check_number, check_shape

_COLOURS, _MOST_ELONGATED = (1, 3, 4), 4  # usual numbers of channels, and the largest usual ratio of sides
LEAST_ROOM = 2  # how many more carriers than bits it takes for any margin
_MAX_INPUTS, _MAX_PROJECTION = 1 << 25, 1 << 29  # what a received key may make its reader allocate


def check_name(name: str, value: Any, *, minimum: int) -> None:
    """Refuse a value that is not text of ``minimum`` to 256 characters in the normal form NFC."""
    check_instance(name, value, str)
    if not minimum <= len(value) <= 256 or value != unicodedata.normalize("NFC", value):
        raise ValueError(
            f"`{name}` must be NFC-normalized text of {minimum} to 256 characters, got {len(value)} "
            "characters."
        )


def check_input_shape(shape: Any) -> tuple[int, ...]:
    """Return an input shape ``(C, H, W)`` of at most 2^25 coordinates."""
    sizes = check_shape(shape)
    if math.prod(sizes) > _MAX_INPUTS:
        raise ValueError(f"`input_shape` must have at most {_MAX_INPUTS} coordinates, got {sizes}.")
    return sizes


def warn_if_channels_last(shape: tuple[int, ...], *, stacklevel: int) -> None:
    """Warn of a shape that looks like ``(H, W, C)``; ``stacklevel`` is the caller's.

    It is not an error, because a signal of eight channels may have the shape (8, 8, 1).
    """
    height, width, channels = shape
    if (
        channels in _COLOURS
        and _COLOURS[-1] < min(height, width)
        and max(height, width) <= _MOST_ELONGATED * min(height, width)
    ):
        warnings.warn(
            f"`input_shape` is {shape}, which says {height} channels of {width} x {channels} pixels: if "
            f"these are images with the channels last, make the key with ({channels}, {height}, {width}).",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def check_capacity(n_bits: int, n_carriers: Any, input_shape: tuple[int, ...]) -> None:
    """Refuse more carriers than the input has, or fewer than the bits need."""
    size = math.prod(input_shape)
    check_int("n_carriers", n_carriers, minimum=1)
    if n_carriers > size:
        product = " * ".join(str(s) for s in input_shape)
        raise ValueError(
            f"`n_carriers` must be at most {product} = {size} (one per input coordinate), got {n_carriers}."
        )
    if n_bits * n_carriers > _MAX_PROJECTION:
        raise ValueError(
            f"`n_bits` * `n_carriers` must be <= {_MAX_PROJECTION}, the size of the projection, got {n_bits} "
            f"* {n_carriers}."
        )
    if n_bits > n_carriers:
        raise ValueError(
            f"`n_bits` must be at most `n_carriers`: {n_bits} sign conditions on {n_carriers} carriers leave "
            f"{n_carriers} - {n_bits} = {n_carriers - n_bits} degrees of freedom, so the bits cannot be "
            f"embedded independently. {more_room(n_bits, size)}"
        )


def more_room(n_bits: int, size: int) -> str:
    """Return how to make a key that can be embedded and `owned`; two carriers per bit leave enough room."""
    least = least_bits()
    if 2 * n_bits <= size:
        return (
            f"Take at least {2 * n_bits} carriers (six per bit are usual; the input has {size} coordinates)."
        )
    if size >= least + LEAST_ROOM:
        return f"Take {_span(least, max(least, size // 2))} bits, on all of the input's {size} coordinates."
    return (
        f"The input has {size} coordinates, too few for the {least} bits that a key needs to ever be "
        "`owned`: sign larger inputs, or the output of a layer (`carrier_layer`)."
    )


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def warn_if_never_held(n_bits: int, n_carriers: int, shape: tuple[int, ...], *, stacklevel: int) -> None:
    """Warn of a new key with too few carriers for any margin; ``stacklevel`` is the caller's.

    It is not an error, because such a key may be read, or embedded without a margin.
    """
    if n_carriers - n_bits < LEAST_ROOM:
        warnings.warn(
            f"{n_bits} bits on {n_carriers} carriers leave no room for a margin, so the default objective "
            f"cannot embed this key. {more_room(n_bits, math.prod(shape))}",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def check_statistics(name: str, values: Any, *, n_channels: int) -> None:
    """Refuse means or standard deviations that are not valid for ``n_channels`` channels."""
    if len(values) not in (1, n_channels):
        raise ValueError(
            f"`{name}` must be one value or one per channel ({n_channels}), got {len(values)} values."
        )
    for value in values:
        check_number(name, value)
        if name == "input_std" and value <= 0:
            raise ValueError(f"`input_std` must be positive, got {value!r}.")


def as_floats(name: str, value: Any) -> tuple[float, ...]:
    """Return one number or a sequence of them as a tuple."""
    values = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else (value,)
    return tuple(check_number(name, v) + 0.0 for v in values)  # -0.0 becomes 0.0: equal keys have equal bytes
