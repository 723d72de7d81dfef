"""The key of a run: read from a file, or made for it."""

from __future__ import annotations

from collections.abc import Sequence

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.runs.options import load_key


def load_or_generate(
    path: str | None,
    *,
    input_shape: Sequence[int],
    input_mean: Sequence[float],
    input_std: Sequence[float],
    owner: str = "",
    scope: str = "",
    n_bits: int = 128,
    n_carriers: int | None = None,
    target_class: int = 0,
    payload: str | None = None,
) -> WatermarkKey:
    """Return the key in file ``path``, or a new one if there is no ``path``.

    A file decides all but the three arguments that follow, which say what the data group's images look like; those it must fit.

    Args:
        path: key file, or None.
        input_shape: shape of the data group's images.
        input_mean: mean of their normalisation.
        input_std: standard deviation of their normalisation.
        owner: see :meth:`WatermarkKey.generate`, as the others.
        scope: model or product that the key is bound to.
        n_bits: signature bits.
        n_carriers: inputs that carry them; None takes six a bit, or all.
        target_class: class whose input gradients are signed.
        payload: text that the signature carries, or None.

    Raises:
        ValueError: the key file cannot be read or does not fit the data group; or an argument is out of its range.
    """
    if path is None:
        return WatermarkKey.generate(
            owner,
            n_bits,
            input_shape=input_shape,
            target_class=target_class,
            n_carriers=n_carriers,
            payload=payload,
            input_mean=input_mean,
            input_std=input_std,
            scope=scope,
        )
    key = load_key(path)
    check_key_fits(key, input_shape=input_shape, input_mean=input_mean, input_std=input_std)
    return key


def check_key_fits(
    key: WatermarkKey, *, input_shape: Sequence[int], input_mean: Sequence[float], input_std: Sequence[float]
) -> None:
    """Raise a ``ValueError`` that lists in what ``key`` differs from the data that it is used with."""
    n_channels = key.input_shape[0]
    expected = {"input_shape": tuple(input_shape), "input_mean": tuple(input_mean), "input_std": tuple(input_std)}
    own = {
        "input_shape": key.input_shape,
        "input_mean": _per_channel(key.input_mean, n_channels),
        "input_std": _per_channel(key.input_std, n_channels),
    }
    wrong = [f"`{n}` is {own[n]} in the key and {value} in the data" for n, value in expected.items() if own[n] != value]
    if wrong:
        raise ValueError(
            f"`key` does not fit the data: {'; '.join(wrong)}. Choose the data that it was made for, or make one for these with "
            "`gradsigns keygen data=...`."
        )


def _per_channel(values: tuple[float, ...], n_channels: int) -> tuple[float, ...]:
    return values if len(values) == n_channels else values * n_channels
