"""Attacks on inputs: the thief's API changes images before the stolen model sees them.

All work on raw pixels, as WRT's input preprocessors do (the Watermark-Robustness-Toolbox; Lukas et al., SoK,
IEEE S&P 2022). Each is shown at the toolbox's milder settings on the way to its own.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe
from gradsigns_lightning.attacks.serving import check_positive, drawn, served
from gradsigns_lightning.core.utils.checks import check_choice, check_int
from gradsigns_lightning.core.utils.optional import require

SMOOTHINGS = ("gaussian", "mean", "median")
_MODES = {1: "L", 3: "RGB"}  # of Pillow, by the number of channels


def compress_inputs(
    model: nn.Module, data: AttackData, *, quality: int = 95, observe: Observe | None = None
) -> nn.Module:
    """Compress images as JPEG (WRT: JPEG compression, qualities 95, 65 and 45).

    The toolbox cuts pixels to 8 bits; they are rounded here.

    Args:
        model: the stolen model.
        data: what the thief has; images of 1 or 3 channels.
        quality: of Pillow's encoder, in [1, 100], with its usual subsampling of colors.
        observe: is shown the model at each quality; the dose is 100 minus that.

    Raises:
        ValueError: ``quality`` is out of range, or images have another number of channels.
        ImportError: Pillow is not installed.
    """
    check_int("quality", quality, minimum=1, maximum=100)
    n_channels = data.clean[0][0].shape[0]
    if n_channels not in _MODES:
        raise ValueError(f"`data` must have images of 1 or 3 channels, got {n_channels}.")
    require("PIL", extra="attacks")
    qualities = [*(q for q in (95, 65, 45) if q > quality), quality]
    filters = {100.0 - q: partial(_jpeg, quality=q) for q in qualities}
    return served(model, data, observe=observe, filters=filters)


@dataclass(frozen=True)
class JpegCompression(Attack):
    """Images compressed as JPEG; see :func:`compress_inputs`."""

    function = staticmethod(compress_inputs)
    kind = "responses"

    quality: int = 95


def quantize_inputs(
    model: nn.Module, data: AttackData, *, n_bins: int = 16, observe: Observe | None = None
) -> nn.Module:
    """Replace each pixel by the middle of its bin (WRT: input quantization, 16, 12 and 10 bins).

    The toolbox leaves pixels of the brightest bin as they are; they are replaced here, too.

    Args:
        model: the stolen model.
        data: what the thief has.
        n_bins: bins of equal width on [0, 1], >= 2.
        observe: is shown the model at each number of bins; the dose is a bin's width.

    Raises:
        ValueError: ``n_bins`` is out of range.
    """
    check_int("n_bins", n_bins, minimum=2)
    numbers = [*(n for n in (16, 12, 10) if n > n_bins), n_bins]
    return served(model, data, observe=observe, filters={1 / n: partial(_binned, n_bins=n) for n in numbers})


@dataclass(frozen=True)
class InputQuantization(Attack):
    """Pixels of few values; see :func:`quantize_inputs`."""

    function = staticmethod(quantize_inputs)
    kind = "responses"

    n_bins: int = 16


def squeeze_features(
    model: nn.Module, data: AttackData, *, bit_depth: int = 4, observe: Observe | None = None
) -> nn.Module:
    """Reduce the pixels' bit depth (Xu et al., NDSS 2018: feature squeezing; WRT: 4 bits on CIFAR-10).

    Args:
        model: the stolen model.
        data: what the thief has.
        bit_depth: bits of each pixel, in [1, 8].
        observe: is shown the model at 7 bits and below; the dose is the number of bits taken away from 8.

    Raises:
        ValueError: ``bit_depth`` is out of range.
    """
    check_int("bit_depth", bit_depth, minimum=1, maximum=8)
    depths = [*range(7, bit_depth, -1), bit_depth]
    filters = {8.0 - bits: partial(_squeezed, bit_depth=bits) for bits in depths}
    return served(model, data, observe=observe, filters=filters)


@dataclass(frozen=True)
class FeatureSqueezing(Attack):
    """Pixels of few bits; see :func:`squeeze_features`."""

    function = staticmethod(squeeze_features)
    kind = "responses"

    bit_depth: int = 4


def smooth_inputs(
    model: nn.Module,
    data: AttackData,
    *,
    smoothing: str = "gaussian",
    std: float = 0.5,
    kernel_size: int = 3,
    observe: Observe | None = None,
) -> nn.Module:
    """Blur images (WRT: input smoothing, Gaussian of 0.5, 0.6 and 0.7 pixels, mean and median of 3x3).

    Args:
        model: the stolen model.
        data: what the thief has.
        smoothing: ``"gaussian"`` and ``"mean"`` with zeros around the image, or ``"median"`` with its edge
            repeated, as the toolbox does.
        std: standard deviation of the Gaussian in pixels, above 0.
        kernel_size: height and width of the mean and the median, odd.
        observe: is shown the model; the dose is ``std`` of the Gaussian, else ``kernel_size``.

    Raises:
        ValueError: a setting is out of range.
        ImportError: kornia is not installed.
    """
    check_choice("smoothing", smoothing, SMOOTHINGS)
    if not check_int("kernel_size", kernel_size, minimum=1) % 2:
        raise ValueError(f"`kernel_size` must be odd, got {kernel_size}.")
    check_positive("std", std)
    require("kornia.filters", extra="attacks")
    if smoothing == "gaussian":
        stds = [*(s for s in (0.5, 0.6, 0.7) if s < std), std]
        return served(model, data, observe=observe, filters={s: partial(_gaussian, std=s) for s in stds})
    kernel: Callable[..., Tensor] = _mean if smoothing == "mean" else _median
    sizes = range(3, kernel_size + 1, 2) if kernel_size > 1 else (1,)
    return served(model, data, observe=observe, filters={size: partial(kernel, size=size) for size in sizes})


@dataclass(frozen=True)
class InputSmoothing(Attack):
    """Blurred images; see :func:`smooth_inputs`."""

    function = staticmethod(smooth_inputs)
    kind = "responses"

    smoothing: str = "gaussian"
    std: float = 0.5
    kernel_size: int = 3


def add_input_noise(
    model: nn.Module,
    data: AttackData,
    *,
    std: float = 0.01,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Add normal noise to each image (WRT: input noising, deviations 0.01, 0.03, 0.05 and 0.1).

    The noise is a function of the image, so asking again does not average it out; the toolbox draws it anew
    for each question, and GradSigns' authors (MLSys 2021) one pattern for all images.

    Args:
        model: the stolen model.
        data: what the thief has.
        std: the noise's standard deviation, for pixels in [0, 1], to which they are clipped afterwards; > 0.
        seed: of the noise.
        observe: is shown the model at each of the toolbox's deviations up to ``std``, the dose.

    Raises:
        ValueError: ``std`` is out of range.
    """
    check_positive("std", std)
    stds = [*(s for s in (0.01, 0.03, 0.05, 0.1) if s < std), std]
    filters = {s: partial(_noisy, std=s, seed=seed) for s in stds}
    return served(model, data, observe=observe, filters=filters)


@dataclass(frozen=True)
class InputNoising(Attack):
    """Noisy images; see :func:`add_input_noise`."""

    function = staticmethod(add_input_noise)
    kind = "responses"

    std: float = 0.01
    seed: int = 0


def flip_inputs(model: nn.Module, data: AttackData, *, observe: Observe | None = None) -> nn.Module:
    """Mirror images from left to right (WRT: input flipping).

    Networks that were not trained on mirrored images lose accuracy; readers must look for the mirrored key.

    Args:
        model: the stolen model.
        data: what the thief has.
        observe: is shown the model, at dose 1.
    """
    return served(model, data, observe=observe, filters={1: _mirrored})


@dataclass(frozen=True)
class InputFlipping(Attack):
    """Mirrored images; see :func:`flip_inputs`."""

    function = staticmethod(flip_inputs)
    kind = "responses"


def _jpeg(pixels: Tensor, *, quality: int) -> Tensor:
    pillow, mode = require("PIL.Image", extra="attacks"), _MODES[pixels.shape[1]]
    images = (pixels.clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
    decoded = []
    for image in images:
        file = io.BytesIO()
        height, width, n_channels = image.shape
        pillow.frombytes(mode, (width, height), image.contiguous().numpy().tobytes()).save(
            file, format="jpeg", quality=quality
        )
        content = bytearray(pillow.open(file).convert(mode).tobytes())
        decoded.append(torch.frombuffer(content, dtype=torch.uint8).view(height, width, n_channels))
    return torch.stack(decoded).permute(0, 3, 1, 2).to(pixels) / 255


def _binned(pixels: Tensor, *, n_bins: int) -> Tensor:
    return ((pixels * n_bins).floor().clamp(0, n_bins - 1) + 0.5) / n_bins


def _squeezed(pixels: Tensor, *, bit_depth: int) -> Tensor:
    largest = (1 << bit_depth) - 1
    return (pixels.clamp(0, 1) * largest).round() / largest


def _gaussian(pixels: Tensor, *, std: float) -> Tensor:
    size = 2 * (math.ceil(6 * std + 1) // 2) + 1  # three deviations to each side, and odd
    filters = require("kornia.filters", extra="attacks")
    blurred: Tensor = filters.gaussian_blur2d(pixels, (size, size), (std, std), border_type="constant")
    return blurred


def _mean(pixels: Tensor, *, size: int) -> Tensor:
    filters = require("kornia.filters", extra="attacks")
    blurred: Tensor = filters.box_blur(pixels, (size, size), border_type="constant")
    return blurred


def _median(pixels: Tensor, *, size: int) -> Tensor:
    filters, margin = require("kornia.filters", extra="attacks"), size // 2
    padded = F.pad(pixels, (margin,) * 4, mode="replicate")
    inside = slice(margin, -margin or None)
    blurred: Tensor = filters.median_blur(padded, (size, size))[:, :, inside, inside]
    return blurred


def _noisy(pixels: Tensor, *, std: float, seed: int) -> Tensor:
    shape = pixels.shape[1:]
    noise = drawn(pixels, seed, lambda random: torch.randn(shape, generator=random))
    return (pixels + std * noise.to(pixels)).clamp(0, 1)


def _mirrored(pixels: Tensor) -> Tensor:
    return pixels.flip(3)
