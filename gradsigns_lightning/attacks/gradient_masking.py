"""Gradient masking: the thief makes the input gradients vanish, while the answers stay what they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.attacks.base import (
    Attack,
    AttackData,
    Observe,
    copied,
    device_of,
    last_layer,
    observed,
    predictions,
)
from gradsigns_lightning.attacks.training import Loss, cross_entropy, train
from gradsigns_lightning.core.utils.checks import check_int, check_number


def saturate(
    model: nn.Module, data: AttackData, *, factor: float = 1000.0, observe: Observe | None = None
) -> nn.Module:
    """Scale the logits up until the softmax is saturated (Carlini and Wagner, IEEE S&P 2017).

    They found that this is all that defensive distillation hides: in floating point, the gradient of a loss
    whose probability is exactly 1 is exactly 0. The classes that are predicted stay the same. A reader that
    takes the gradient of ``log((1 - p) / p)`` is not fooled: it has the same direction, and does not vanish.

    Args:
        model: the stolen model, whose last linear layer makes the logits.
        data: what the thief has.
        factor: by which the logits grow, >= 1.
        observe: is shown the model at factors of 1, 10, 100, ... and at the last.

    Returns:
        The scaled copy.

    Raises:
        ValueError: the factor is out of range, or the last linear layer does not make the logits.
    """
    check_number("factor", factor, minimum=1)
    attacked, before = copied(model), predictions(model, data)
    head = last_layer(attacked)
    weights = [parameter.detach().clone() for parameter in head.parameters()]
    doses = [10.0**k for k in range(40) if 10.0**k < factor] if observe else []
    for dose in [*doses, factor]:
        with torch.no_grad():
            for parameter, weight in zip(head.parameters(), weights, strict=True):
                parameter.copy_(weight * dose)
        observed(observe, dose, attacked)
    if not torch.allclose(predictions(attacked, data), before * factor, rtol=1e-3, atol=1e-3 * factor):
        raise ValueError("`model` must return what its last linear layer makes; its logits did not scale.")
    return attacked


@dataclass(frozen=True)
class Saturation(Attack):
    """Scaling of the logits; see :func:`saturate`."""

    function = staticmethod(saturate)

    factor: float = 1000.0


def distill_defensively(
    model: nn.Module,
    data: AttackData,
    *,
    temperature: float = 100.0,
    epochs: int = 5,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Train and distill at a high temperature, and use the network without (Papernot et al., IEEE S&P 2016).

    Teacher and student both go on from the stolen model, where the paper trains both from scratch; its
    temperature of 100 is the one that hides gradients best.

    Args:
        model: the stolen model.
        data: what the thief has.
        temperature: by which the logits are divided in training, >= 1.
        epochs: epochs of teacher and student each, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch, > 0.
        seed: of batches.
        observe: is shown the student after each epoch.

    Returns:
        The student.

    Raises:
        ValueError: a setting is out of range.
    """
    check_number("temperature", temperature, minimum=1)
    recipe = replace(
        data.recipe,
        epochs=epochs,
        rate=data.recipe.rate * check_number("rate_factor", rate_factor, minimum=0),
    )
    hard = cross_entropy()
    teacher = train(copied(model), data, recipe, loss=_softened(hard, temperature), seed=seed)
    soft = data.relabelled(F.softmax(predictions(teacher, data) / temperature, dim=1))
    return train(teacher, soft, recipe, loss=_softened(hard, temperature), observe=observe, seed=seed)


@dataclass(frozen=True)
class DefensiveDistillation(Attack):
    """Defensive distillation; see :func:`distill_defensively`."""

    function = staticmethod(distill_defensively)

    temperature: float = 100.0
    epochs: int = 5
    rate_factor: float = 1.0
    seed: int = 0


def shatter(
    model: nn.Module, data: AttackData, *, bits: int = 8, observe: Observe | None = None
) -> nn.Module:
    """Round the input, so that its gradient is zero: shattered gradients (Athalye et al., ICML 2018).

    Images of ``bits`` bits are classified as before. A judge who looks at the network sees the rounding.

    Args:
        model: the stolen model.
        data: what the thief has; its normalization says what a raw pixel is.
        bits: bits of a pixel that are kept, from 1 to 16.
        observe: is shown the model; the dose is the number of bits.

    Returns:
        A copy behind the rounding.

    Raises:
        ValueError: ``bits`` is out of range.
    """
    check_int("bits", bits, minimum=1, maximum=16)
    attacked = nn.Sequential(_Rounding(data, bits), copied(model)).eval().to(device_of(model))
    observed(observe, bits, attacked)
    return attacked


@dataclass(frozen=True)
class Shattering(Attack):
    """Rounding of the input; see :func:`shatter`."""

    function = staticmethod(shatter)

    bits: int = 8


class _Rounding(nn.Module):
    """Rounds normalized inputs to so many bits of a raw pixel."""

    mean: Tensor
    std: Tensor

    def __init__(self, data: AttackData, bits: int) -> None:
        super().__init__()
        self.levels = 2**bits - 1
        self.register_buffer("mean", torch.tensor(data.input_mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(data.input_std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        rounded = ((x * self.std + self.mean) * self.levels).round() / self.levels
        normalized: Tensor = (rounded - self.mean) / self.std
        return normalized


def _softened(loss: Loss, temperature: float) -> Loss:
    return lambda model, x, y: loss(_Divided(model, temperature), x, y)


class _Divided(nn.Module):
    """A network whose logits are divided by a temperature."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits / self.temperature
