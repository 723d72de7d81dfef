"""What all readers share: checks of raw images and keys, normalization, rounding to 8 bits, and warnings."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Protocol

import torch
from torch import Tensor, nn

from gradsigns_lightning.core.key import WatermarkKey, key_of
from gradsigns_lightning.core.key.signature_key import SignatureKey, check_carriers, check_images
from gradsigns_lightning.core.result import Verdict, is_recognised
from gradsigns_lightning.core.signature import pixel_scale
from gradsigns_lightning.core.utils.checks import check_instance

MIN_IMAGES = 50  # with fewer, the sampling noise of the mean gradient costs bits


class FewImagesWarning(UserWarning):
    """There are fewer than :data:`MIN_IMAGES` images, and more might change the verdict."""


def readable_key(key: SignatureKey | str | PathLike[str], *, argument: str = "key") -> SignatureKey:
    """Return a key, read from its file if a path is given.

    Raises:
        ValueError: the file is missing, damaged or not a key file.
        TypeError: ``key`` is neither a key nor a path.
    """
    is_foreign = not isinstance(key, (WatermarkKey, str, PathLike)) and isinstance(key, SignatureKey)
    return key if is_foreign else key_of(key, argument=argument)  # type: ignore[return-value, arg-type]


def check_key(key: SignatureKey) -> None:
    """Refuse a key whose arrays do not fit together; a :class:`WatermarkKey` derives arrays that do."""
    if not isinstance(key, WatermarkKey):
        check_carriers(key)


def check_raw_images(images: Tensor, key: SignatureKey) -> None:
    """Refuse images that are not raw or not of the key's shape, and an empty batch."""
    check_instance(
        "images",
        images,
        Tensor,
        hint="Convert an array with torch.from_numpy, a list of images with torch.stack.",
    )
    hint = "Divide bytes by 255." if images.dtype == torch.uint8 else ""
    if images.ndim == 4 and (images.shape[3], *images.shape[1:3]) == key.input_shape != tuple(
        images.shape[1:]
    ):
        hint += f"{hint and ' '}Channels come first: images.permute(0, 3, 1, 2)."
    check_images(images, key.input_shape, least=1, hint=hint)
    low, high = (float(v) for v in images.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"`images` must be raw pixels in [0, 1] (before any normalization), got values from {low:g} to "
            f"{high:g}."
        )


def pixels_of(images: Tensor) -> Tensor:
    """Return raw images in [0, 1] as uint8 on the CPU; a replay depends on every bit of them."""
    return (images.detach() * 255).round().to("cpu", torch.uint8)


def normalize(images: Tensor, key: SignatureKey) -> Tensor:
    """Normalize raw images with the key's ``input_mean`` and ``input_std``."""
    mean, std = pixel_scale(key, device=images.device, dtype=images.dtype)
    return (images - mean) / std


class RawInputs(nn.Module):
    """Wraps a classifier of normalized images so that it takes raw ones.

    Args:
        model: takes normalized images ``(n, C, H, W)`` and returns logits.
        input_mean: mean of the model's normalization, one value or one per channel.
        input_std: standard deviation of that normalization, positive, one value or one per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, *, input_mean: Sequence[float], input_std: Sequence[float]) -> None:
        super().__init__()
        check_instance("model", model, nn.Module)
        self.model = model
        self.register_buffer("mean", torch.tensor(input_mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(input_std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of raw images ``(n, C, H, W)`` in [0, 1]."""
        logits: Tensor = self.model((images - self.mean) / self.std)
        return logits


class _Found(Protocol):
    """The part of a reading's or a trace's result that warnings need."""

    @property
    def n_bits(self) -> int: ...
    @property
    def n_matches(self) -> int: ...
    @property
    def verdict(self) -> Verdict: ...
    @property
    def recognised(self) -> float: ...


def warn_if_unlike(
    results: Sequence[_Found],
    n_images: int,
    target_class: int,
    *,
    n_classified: int | None = None,
    stacklevel: int,
) -> None:
    """Warn about too few images where more might change a verdict, and about images that are not recognised.

    Args:
        results: the results of one reading.
        n_images: number of images that were given.
        target_class: class T.
        n_classified: number of images that the share ``recognised`` refers to; by default all of them.
        stacklevel: as for :func:`warnings.warn`, counted from this function's caller.
    """
    n_classified = n_images if n_classified is None else n_classified
    recognised = results[0].recognised
    if any(result.verdict != "owned" and result.n_matches < result.n_bits for result in results):
        warn_if_few(n_images, stacklevel=stacklevel + 1)
    if not is_recognised(recognised):
        warnings.warn(
            f"The model classifies only {round(recognised * n_classified)} of {n_classified} images as class "
            f"{target_class}: nothing is concluded. Are they of the target class, raw in [0, 1], and do "
            "`input_mean` and `input_std` fit the model?",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def warn_if_few(n_images: int, *, stacklevel: int) -> None:
    """Warn about too few images; ``stacklevel`` as for :func:`warn_if_unlike`."""
    if n_images < MIN_IMAGES:
        plural = "s" if n_images > 1 else ""
        warnings.warn(
            f"Only {n_images} image{plural}: below {MIN_IMAGES} the mean gradient is noisy and bits can be "
            "lost.",
            FewImagesWarning,
            stacklevel=stacklevel + 1,
        )
