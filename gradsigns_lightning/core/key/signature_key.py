"""What readers need of a key, and checks of images and keys against it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from gradsigns_lightning.core.key.checks import as_floats, check_statistics

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class SignatureKey(Protocol):
    """What a reader needs of a key: where to look, and which bits to expect; see :class:`WatermarkKey`."""

    @property
    def n_bits(self) -> int:
        """Number of signature bits N."""
        ...

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape ``(C, H, W)`` of one raw input."""
        ...

    @property
    def target_class(self) -> int:
        """Class T whose input gradients are signed."""
        ...

    @property
    def input_mean(self) -> tuple[float, ...]:
        """Mean that the model's preprocessing subtracts, one value or one per channel."""
        ...

    @property
    def input_std(self) -> tuple[float, ...]:
        """Standard deviation that the preprocessing divides by, one value or one per channel."""
        ...

    @property
    def carriers(self) -> Tensor:
        """Indices into the flattened raw input, ascending; shape ``(c,)``, int64."""
        ...

    @property
    def projection(self) -> Tensor:
        """Matrix E; shape ``(N, c)``."""
        ...

    @property
    def signature(self) -> Tensor:
        """Bits b; shape ``(N,)``, uint8."""
        ...

    @property
    def commitment(self) -> str:
        """Public digest of the key."""
        ...


def check_images(images: Tensor, input_shape: tuple[int, ...], *, least: int = 0, hint: str = "") -> None:
    """Refuse images that are not floating point of the key's shape, or too few.

    Args:
        images: images, shape ``(n, C, H, W)``.
        input_shape: the key's input shape.
        least: smallest allowed n.
        hint: sentence of advice at the end of the message.

    Raises:
        ValueError: the images do not fit; the message names their dtype and shape.
    """
    if not images.is_floating_point() or tuple(images.shape[1:]) != tuple(input_shape) or len(images) < least:
        number = f" with n >= {least}" if least else ""
        raise ValueError(
            f"`images` must be floating point of shape (n, {', '.join(map(str, input_shape))}){number} as "
            f"the key's `input_shape` says, got {images.dtype} of shape "
            f"{tuple(images.shape)}.{hint and ' '}{hint}"
        )


def check_carriers(key: SignatureKey) -> None:
    """Refuse a key whose carriers do not lie in its input, or whose arrays do not fit together.

    Raises:
        ValueError: the carriers or arrays do not fit; the message names the shapes.
    """
    size, n_bits, carriers = math.prod(key.input_shape), key.n_bits, key.carriers
    if carriers.ndim != 1 or not len(carriers) or int(carriers.min()) < 0 or int(carriers.max()) >= size:
        span = f"{int(carriers.min())} to {int(carriers.max())}" if carriers.numel() else "none"
        raise ValueError(
            f"`key` must have carriers (c,) in 0 to {size - 1}, as its `input_shape` "
            f"{tuple(key.input_shape)} says, got {span}, shape {tuple(carriers.shape)}."
        )
    expected, found = (n_bits, len(carriers)), tuple(key.projection.shape)
    if found != expected or tuple(key.signature.shape) != (n_bits,):
        raise ValueError(
            f"`key` must have a projection of shape {expected} and a signature of shape ({n_bits},) for its "
            f"{n_bits} bits on {len(carriers)} carriers, got {found} and {tuple(key.signature.shape)}."
        )


@dataclass(frozen=True)
class KeyAsRead:
    """A key as read from a model with another input normalization; see :class:`SignatureKey`."""

    n_bits: int
    input_shape: tuple[int, ...]
    target_class: int
    input_mean: tuple[float, ...]
    input_std: tuple[float, ...]
    carriers: Tensor = field(repr=False)
    projection: Tensor = field(repr=False)
    signature: Tensor = field(repr=False)
    commitment: str

    @classmethod
    def of(
        cls, key: SignatureKey, *, input_mean: float | Sequence[float], input_std: float | Sequence[float]
    ) -> KeyAsRead:
        """Return ``key`` with the normalization that the model's own documentation states.

        Raises:
            ValueError: a value is out of range, or their number does not fit the key's channels.
            TypeError: a value is not a number.
        """
        stated = {
            "input_mean": as_floats("input_mean", input_mean),
            "input_std": as_floats("input_std", input_std),
        }
        for name, values in stated.items():
            check_statistics(name, values, n_channels=key.input_shape[0])
        others: dict[str, Any] = {e.name: getattr(key, e.name) for e in fields(cls) if e.name not in stated}
        return cls(**others, input_mean=stated["input_mean"], input_std=stated["input_std"])
