"""Raw images as every reader takes them: their checks, their normalization, their 8 bits; and the keys to read with."""

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

MIN_IMAGES = 50  # below, the sampling noise of the mean gradient costs bits


class FewImagesWarning(UserWarning):
    """There are fewer than :data:`MIN_IMAGES` images, and more might change the verdict."""


def readable_key(key: SignatureKey | str | PathLike[str], *, argument: str = "key") -> SignatureKey:
    """Return a key as readers take it: anybody's :class:`SignatureKey`, a :class:`WatermarkKey`, or the latter's file.

    Raises:
        ValueError: the file is missing, damaged or no key file.
        TypeError: it is no key and no path.
    """
    is_others = not isinstance(key, (WatermarkKey, str, PathLike)) and isinstance(key, SignatureKey)
    return key if is_others else key_of(key, argument=argument)  # type: ignore[return-value, arg-type]


def check_key(key: SignatureKey) -> None:
    """Refuse a key whose arrays do not fit together; those of :class:`WatermarkKey` do."""
    if not isinstance(key, WatermarkKey):
        check_carriers(key)


def check_raw_images(images: Tensor, key: SignatureKey) -> None:
    """Refuse images that are not raw, of the key's shape and at least one."""
    check_instance(
        "images",
        images,
        Tensor,
        hint="Of an array torch.from_numpy makes one, of a list of images torch.stack.",
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
    """Return raw images in [0, 1] as 8-bit ones, uint8 on the host; a replay depends on every bit of them."""
    return (images.detach() * 255).round().to("cpu", torch.uint8)


def normalize(images: Tensor, key: SignatureKey) -> Tensor:
    """Make the model's inputs from raw images as the key's ``input_mean`` and ``input_std`` say."""
    mean, std = pixel_scale(key, device=images.device, dtype=images.dtype)
    return (images - mean) / std


class RawInputs(nn.Module):
    """A classifier of raw images, made of one whose inputs are normalized.

    Args:
        model: takes normalized images ``(n, C, H, W)`` and returns logits.
        input_mean: mean of its normalization, one value or one per channel.
        input_std: standard deviation, positive, one value or one per channel.
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
    """What a reader found, a claim or a customer."""

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
    n_asked: int | None = None,
    stacklevel: int,
) -> None:
    """Warn of too few images where more might have changed a verdict, and of images that the model does not take for the class.

    Args:
        results: what was found by one reading.
        n_images: images at hand.
        target_class: class T.
        n_asked: of how many images the share that was recognised is; by default of all.
        stacklevel: of the caller whom the warning is for, seen from this function's caller, who is 1.
    """
    n_asked = n_images if n_asked is None else n_asked
    recognised = results[0].recognised
    if any(result.verdict != "owned" and result.n_matches < result.n_bits for result in results):
        warn_if_few(n_images, stacklevel=stacklevel + 1)
    if not is_recognised(recognised):
        warnings.warn(
            f"The model takes only {round(recognised * n_asked)} of {n_asked} images for class "
            f"{target_class}: nothing is "
            "concluded. Are they of the target class, raw in [0, 1], and do `input_mean` and `input_std` fit "
            "the model?",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def warn_if_few(n_images: int, *, stacklevel: int) -> None:
    """Warn of too few images; ``stacklevel`` as for :func:`warn_if_unlike`."""
    if n_images < MIN_IMAGES:
        plural = "s" if n_images > 1 else ""
        warnings.warn(
            f"Only {n_images} image{plural}: below {MIN_IMAGES} the mean gradient is noisy and bits can get "
            f"lost.",
            FewImagesWarning,
            stacklevel=stacklevel + 1,
        )
