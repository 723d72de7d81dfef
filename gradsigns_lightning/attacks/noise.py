"""Noise on the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, copied, last_layer, observed, seeded
from gradsigns_lightning.attacks.recovery import recover, up_to, weights_of
from gradsigns_lightning.core.utils.checks import check_number


def add_weight_noise(
    model: nn.Module,
    data: AttackData,
    *,
    size: float = 0.2,
    step: float = 0.05,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Add Gaussian noise to all weights, without training: the half of weight shifting that needs no images.

    Args:
        model: the stolen model.
        data: what the thief has, of which nothing is used.
        size: standard deviation of the noise, in units of the one of each layer's weights, >= 0.
        step: distance of the sizes at which ``observe`` is shown a model, >= 0.001.
        seed: of the noise, which is the same at all sizes but for its size.
        observe: is shown the model at each size.

    Returns:
        The noisy copy.

    Raises:
        ValueError: a setting is out of range, or the model has no weights.
    """
    check_number("size", size, minimum=0)
    check_number("step", step, minimum=0.001)
    for dose in [size] if observe is None else up_to(size, step):
        attacked = copied(model)
        with torch.no_grad(), seeded(seed, attacked):
            for module, name in weights_of(attacked):
                weight = getattr(module, name)
                weight.add_(dose * _noise_like(weight))
        observed(observe, dose, attacked)
    return attacked


@dataclass(frozen=True)
class WeightNoise(Attack):
    """Gaussian noise on weights; see :func:`add_weight_noise`."""

    function = staticmethod(add_weight_noise)

    size: float = 0.2
    step: float = 0.05
    seed: int = 0


def shift_weights(
    model: nn.Module,
    data: AttackData,
    *,
    shift: float = 1.5,
    noise: float = 1.0,
    epochs: int = 10,
    rate_factor: float = 1.0,
    labels: str = "predicted",
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Move each layer's filters by their mean, add noise, then fine-tune (Lukas et al., IEEE S&P 2022).

    From the weights of each layer but the head, ``shift`` times the mean filter of that layer is taken off,
    and noise of ``noise`` times their standard deviation. The Watermark-Robustness-Toolbox does that to what
    is called ``conv`` in its network, which leaves its projected shortcuts out as well; here they are moved.

    Args:
        model: the stolen model.
        data: what the thief has.
        shift: times the mean filter; the toolbox's ``lmbda``, 1.5 and 2.5 for CIFAR-10.
        noise: its ``lmbda2``, >= 0.
        epochs: epochs of fine-tuning, >= 0.
        rate_factor: its learning rate, in units of the one of a training from scratch, >= 0.
        labels: ``"true"``, or ``"predicted"`` for what the stolen model says, as in that toolbox.
        seed: of the noise and the batches.
        observe: is shown the shifted model at dose 0, and the model after each epoch.

    Returns:
        The attacked copy.

    Raises:
        ValueError: a setting is out of range, or the model has no linear layer.
    """
    check_number("shift", shift)
    check_number("noise", noise, minimum=0)
    attacked = copied(model)
    head = last_layer(attacked)
    with torch.no_grad(), seeded(seed, attacked):
        for module, name in weights_of(attacked):
            if module is not head:
                weight = getattr(module, name)
                weight.sub_(shift * weight.mean(0, keepdim=True) + noise * _noise_like(weight))
    return recover(
        attacked,
        model,
        data,
        epochs=epochs,
        rate_factor=rate_factor,
        labels=labels,
        seed=seed,
        observe=observe,
    )


@dataclass(frozen=True)
class WeightShifting(Attack):
    """Weight shifting; see :func:`shift_weights`."""

    function = staticmethod(shift_weights)

    shift: float = 1.5
    noise: float = 1.0
    epochs: int = 10
    rate_factor: float = 1.0
    labels: str = "predicted"
    seed: int = 0


def _noise_like(weight: Tensor) -> Tensor:
    """Return Gaussian noise with the standard deviation of these weights."""
    return torch.randn_like(weight) * weight.std(correction=0)
