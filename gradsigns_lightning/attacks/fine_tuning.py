"""Fine-tuning attacks: the thief goes on with the training."""

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
    last_layer,
    predictions,
    seeded,
)
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.core.utils.checks import check_choice, check_int, check_number

LAYERS, HEADS, LABELS = ("all", "last"), ("kept", "new"), ("true", "predicted")


def fine_tune(
    model: nn.Module,
    data: AttackData,
    *,
    layers: str = "all",
    head: str = "kept",
    labels: str = "true",
    epochs: int = 5,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Go on with the training: FTAL, FTLL, RTAL and RTLL (Adi et al., USENIX Security 2018).

    Args:
        model: the stolen model.
        data: what the thief has.
        layers: ``"all"``, or ``"last"`` for the head alone, while the rest stays in evaluation mode.
        head: ``"kept"``, or ``"new"`` for one with random weights.
        labels: ``"true"``, or ``"predicted"`` for what the stolen model says.
        epochs: epochs, >= 1; the Watermark-Robustness-Toolbox takes 5, and 10 for RTLL.
        rate_factor: learning rate, in units of the one of a training from scratch, > 0.
        seed: of batches and of a new head.
        observe: is shown the model after each epoch.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range.
    """
    check_choice("layers", layers, LAYERS)
    check_choice("head", head, HEADS)
    recipe = data.recipe.scaled(epochs, rate_factor)
    taught = with_labels(model, data, labels)
    attacked = copied(model)
    if head == "new":
        with seeded(seed, attacked):
            last_layer(attacked).reset_parameters()
    only_head = layers == "last"
    return train(
        attacked,
        taught,
        recipe,
        parameters=last_layer(attacked).parameters() if only_head else None,
        frozen=[attacked] if only_head else (),
        observe=observe,
        seed=seed,
    )


def smooth_labels(
    model: nn.Module,
    data: AttackData,
    *,
    strength: float = 0.3,
    labels: str = "predicted",
    epochs: int = 5,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Go on with the training, labels smoothed (Watermark-Robustness-Toolbox; Lukas et al., IEEE S&P 2022).

    The toolbox's released code takes ten times the rate, and leaves out the runners-up of soft labels instead
    of ``strength``; here the configured ``strength`` is used, at the training's own rate.

    Args:
        model: the stolen model.
        data: what the thief has.
        strength: share of each target that is spread over all classes, in [0, 1].
        labels: ``"true"``, or ``"predicted"`` for what the stolen model says.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch.
        seed: of batches.
        observe: is shown the model after each epoch.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range.
    """
    check_number("strength", strength, minimum=0, maximum=1)
    recipe = replace(data.recipe.scaled(epochs, rate_factor), label_smoothing=strength)
    taught = with_labels(model, data, labels)
    return train(copied(model), taught, recipe, observe=observe, seed=seed)


def noise_labels(
    model: nn.Module,
    data: AttackData,
    *,
    strength: float = 0.8,
    labels: str = "predicted",
    epochs: int = 5,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Go on with the training, labels noisy (Watermark-Robustness-Toolbox; Lukas et al., IEEE S&P 2022).

    In each batch a share of every target moves to the class that a random permutation, drawn for this batch,
    puts in its place. What stays after many batches is the true class, above an even noise.

    Args:
        model: the stolen model.
        data: what the thief has.
        strength: share of each target that moves, in [0, 1].
        labels: ``"true"``, or ``"predicted"`` for what the stolen model says.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch.
        seed: of batches and permutations.
        observe: is shown the model after each epoch.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range.
    """
    check_number("strength", strength, minimum=0, maximum=1)

    def loss(trained: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        targets = F.one_hot(y, data.n_classes).float()
        moved = targets[:, torch.randperm(data.n_classes).to(y.device)]
        return F.cross_entropy(trained(x), (1 - strength) * targets + strength * moved)

    recipe, taught = data.recipe.scaled(epochs, rate_factor), with_labels(model, data, labels)
    return train(copied(model), taught, recipe, loss=loss, observe=observe, seed=seed)


def super_fine_tune(
    model: nn.Module,
    data: AttackData,
    *,
    epochs: int = 6,
    cycles: int = 6,
    rate_factor: float = 10.0,
    second_peak: float = 0.01,
    floor: float = 0.003,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Super-fine-tuning: rates rise and fall in two phases (Sha et al., arXiv 2212.09067, 2022).

    High rates make a network forget, low ones restore its accuracy. The rate climbs from its floor to a peak
    and back, in straight lines; the first half of the cycles has the high peak, the second half the low one.
    The paper's rates are 3e-4, 0.1 and 1e-3 with SGD, for models trained at 0.01, in six epochs. Its period
    is a number of steps on its data sets; here it is an epoch.

    Args:
        model: the stolen model.
        data: what the thief has.
        epochs: epochs, >= 1.
        cycles: times that the rate goes up and down, >= 2.
        rate_factor: first peak, in units of the rate of a training from scratch.
        second_peak: second peak, as a share of the first, in [0, 1].
        floor: lowest rate, as a share of the first peak, in [0, 1].
        seed: of batches.
        observe: is shown the model after each epoch.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range.
    """
    check_int("cycles", cycles, minimum=2)
    check_number("second_peak", second_peak, minimum=0, maximum=1)
    check_number("floor", floor, minimum=0, maximum=1)

    def rate_at(progress: float) -> float:
        peak = 1.0 if progress < 0.5 else second_peak
        height = 1 - abs(2 * (progress * cycles % 1) - 1)
        return floor + (peak - floor) * height

    recipe = data.recipe.scaled(epochs, rate_factor)
    return train(copied(model), data, recipe, rate_at=rate_at, observe=observe, seed=seed)


def with_labels(model: nn.Module, data: AttackData, labels: str) -> AttackData:
    """Return the thief's images with their ``"true"`` labels, or those ``"predicted"`` by a model.

    Raises:
        ValueError: ``labels`` is neither.
    """
    check_choice("labels", labels, LABELS)
    return data.relabelled(predictions(model, data).argmax(1)) if labels == "predicted" else data


@dataclass(frozen=True)
class FineTuning(Attack):
    """Fine-tuning; see :func:`fine_tune`."""

    function = staticmethod(fine_tune)

    layers: str = "all"
    head: str = "kept"
    labels: str = "true"
    epochs: int = 5
    rate_factor: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class LabelSmoothing(Attack):
    """Fine-tuning with smoothed labels; see :func:`smooth_labels`."""

    function = staticmethod(smooth_labels)

    strength: float = 0.3
    labels: str = "predicted"
    epochs: int = 5
    rate_factor: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class LabelNoise(Attack):
    """Fine-tuning with noisy labels; see :func:`noise_labels`."""

    function = staticmethod(noise_labels)

    strength: float = 0.8
    labels: str = "predicted"
    epochs: int = 5
    rate_factor: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class SuperFineTuning(Attack):
    """Fine-tuning at cyclic rates; see :func:`super_fine_tune`."""

    function = staticmethod(super_fine_tune)

    epochs: int = 6
    cycles: int = 6
    rate_factor: float = 10.0
    second_peak: float = 0.01
    floor: float = 0.003
    seed: int = 0
