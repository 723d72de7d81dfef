"""Reads a run's key from a file, and checks that a key fits the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.runs.options import load_key


def from_file(path: Any, **of_a_new_key: Any) -> WatermarkKey:
    """Return the key in a file.

    Args:
        path: key file.
        of_a_new_key: an experiment's settings for a new key, ignored: the file decides all of them.

    Raises:
        ValueError: the file cannot be read.
    """
    return load_key(path)


def check_key_fits(
    key: WatermarkKey, *, input_shape: Sequence[int], input_mean: Sequence[float], input_std: Sequence[float]
) -> None:
    """Raise a ``ValueError`` that lists where ``key`` differs from the data that it is used with."""
    n_channels = key.input_shape[0]
    expected = {
        "input_shape": tuple(input_shape),
        "input_mean": tuple(input_mean),
        "input_std": tuple(input_std),
    }
    own = {
        "input_shape": key.input_shape,
        "input_mean": _per_channel(key.input_mean, n_channels),
        "input_std": _per_channel(key.input_std, n_channels),
    }
    wrong = [
        f"`{n}` is {own[n]} in the key and {value} in the data"
        for n, value in expected.items()
        if own[n] != value
    ]
    if wrong:
        raise ValueError(
            f"`key` does not fit the data: {'; '.join(wrong)}. Choose the data that it was made for, or make "
            "one for these with `gradsigns keygen data=...`."
        )


def _per_channel(values: tuple[float, ...], n_channels: int) -> tuple[float, ...]:
    return values if len(values) == n_channels else values * n_channels
