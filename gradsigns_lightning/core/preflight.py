"""What is warned of before anything is trained, because it would not look wrong until the mark is read."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.signature import pixel_scale

_SLACK = 0.1  # of the range of raw pixels: what an augmentation may add
# of batch normalization, whose statistics then describe the weights of 20 steps before
_LEAST_MOMENTUM = 0.05


def warn_of_scale(images: Tensor, key: WatermarkKey) -> None:
    """Warn of images that are no raw pixels of [0, 1] by the key's normalization: a judge's would read another signature."""
    mean, std = pixel_scale(key, device=images.device, dtype=torch.float32)
    low, high = (images.detach().float() * std + mean).aminmax()
    if low < -_SLACK or high > 1 + _SLACK:
        warnings.warn(
            f"By the key's `input_mean` and `input_std` the first batch's raw pixels range from {low:.3g} to "
            f"{high:.3g}, not "
            "from 0 to 1. Does the key say how the images are normalized? `verify` reads raw images in [0, "
            "1], and would find "
            "another signature.",
            UserWarning,
            stacklevel=3,
        )


def warn_of_lag(module: nn.Module) -> None:
    """Warn of running statistics that describe another network than the one whose weights are signed.

    ResNet-20 with Keras' momentum has in the middle of a training a cross-entropy of 7 by its running
    statistics and of 1.5 by a batch's, and the mark is embedded in the former.
    """
    lagging = [
        name
        for name, m in module.named_modules()
        if isinstance(m, _BatchNorm) and m.training and (m.momentum is None or m.momentum < _LEAST_MOMENTUM)
    ]
    if lagging:
        warnings.warn(
            f"The running statistics of {len(lagging)} batch normalizations ({lagging[0]!r}, ...) follow the "
            f"weights late, as "
            f"their `momentum` is None or below {_LEAST_MOMENTUM}. The mark is embedded in the network that "
            f"they describe, so "
            "bits may be lost: set `momentum` to 0.1, PyTorch's default.",
            UserWarning,
            stacklevel=3,
        )
