"""Warnings before anything is trained, of what would otherwise show only when the mark is read."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.signature import pixel_scale

_SLACK = 0.1  # how far augmentations may exceed the range of raw pixels
_LEAST_MOMENTUM = 0.05  # of batch normalization, whose statistics then lag some 20 steps behind the weights


def warn_of_scale(images: Tensor, key: WatermarkKey) -> None:
    """Warn of images that the key's normalization does not map to raw pixels in [0, 1].

    A judge's images are raw, and would read another signature.
    """
    mean, std = pixel_scale(key, device=images.device, dtype=torch.float32)
    low, high = (images.detach().float() * std + mean).aminmax()
    if low < -_SLACK or high > 1 + _SLACK:
        warnings.warn(
            f"By the key's `input_mean` and `input_std` the first batch's raw pixels range from {low:.3g} to "
            f"{high:.3g}, not from 0 to 1. Does the key say how the images are normalized? `verify` reads "
            "raw images in [0, 1], and would find another signature.",
            UserWarning,
            stacklevel=3,
        )


def warn_of_lag(module: nn.Module) -> None:
    """Warn of running statistics that lag so far behind the weights that they describe another network.

    In the middle of a training, ResNet-20 with Keras' momentum has a cross-entropy of 7 by its running
    statistics and of 1.5 by a batch's, and the mark is embedded with the running statistics.
    """
    lagging = [
        name
        for name, m in module.named_modules()
        if isinstance(m, _BatchNorm) and m.training and (m.momentum is None or m.momentum < _LEAST_MOMENTUM)
    ]
    if lagging:
        warnings.warn(
            f"The running statistics of {len(lagging)} batch normalizations ({lagging[0]!r}, ...) lag behind "
            f"the weights, because their `momentum` is None or below {_LEAST_MOMENTUM}. The mark is embedded "
            "in the network that they describe, so bits may be lost: set `momentum` to 0.1, PyTorch's "
            "default.",
            UserWarning,
            stacklevel=3,
        )
