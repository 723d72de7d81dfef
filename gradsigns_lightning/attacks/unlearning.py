"""Unlearning of perturbations: one that all images share, or each image's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.attacks.base import (
    Attack,
    AttackData,
    Observe,
    copied,
    device_of,
    fetch,
    observed,
    seeded,
)
from gradsigns_lightning.attacks.fine_tuning import with_labels
from gradsigns_lightning.attacks.repair import Enriched
from gradsigns_lightning.attacks.training import make_optimizer, train
from gradsigns_lightning.core.torch_state.contexts import twice_differentiable_kernels
from gradsigns_lightning.core.utils.checks import check_int, check_number
from gradsigns_lightning.data.sources import Batch

# Of the released code: step sizes in raw pixels, the penalty, the share of images that are perturbed.
ASCENT_STEP, FIXED_POINT_STEP, PENALTY, PERTURBED = 10.0, 0.1, 1e-3, 0.01


def unlearn_adversarially(
    model: nn.Module,
    data: AttackData,
    *,
    rounds: int = 5,
    fixed_points: int = 5,
    rate_factor: float = 0.3,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """I-BAU: unlearn a shared perturbation, by implicit hypergradients (Zeng et al., ICLR 2022).

    Each round finds one perturbation of all images that raises the loss, without a bound but with a penalty,
    then lowers the loss of batches of which a hundredth carries it; the gradient takes into account that the
    perturbation depends on the weights. The network stays in evaluation mode. The optimizer is the recipe's;
    the paper's is Adam at 1e-3.

    Args:
        model: the stolen model; twice differentiable.
        data: what the thief has.
        rounds: rounds, >= 1.
        fixed_points: iterations for the implicit part of the gradient, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch.
        seed: of batches and of which images carry the perturbation.
        observe: is shown the model after each round.

    Returns:
        The repaired copy.

    Raises:
        ValueError: a setting is out of range.
    """
    check_int("rounds", rounds, minimum=1)
    check_int("fixed_points", fixed_points, minimum=1)
    attacked, device = copied(model), device_of(model)
    weights = list(attacked.parameters())
    optimizer = make_optimizer(weights, data.recipe.scaled(1, rate_factor))
    batches = data.batches(seed=seed)

    def loss(x: Tensor, y: Tensor, change: Tensor, carry: Tensor | float = 1.0) -> Tensor:
        return F.cross_entropy(attacked(data.normalized(data.raw(x) + carry * change)), y)

    def penalized(x: Tensor, y: Tensor, change: Tensor) -> Tensor:
        return PENALTY * change.square().sum() - loss(x, y, change)

    with seeded(seed, attacked), twice_differentiable_kernels(attacked, device.type):
        for number in range(rounds):
            change = shared_perturbation(attacked, data, penalized, seed=seed + number)
            first: list[Tensor] = []
            for batch in batches:
                x, y = (part.to(device) for part in batch)
                first = first or [x, y]
                outer, inner = partial(loss, x, y, carry=_some(x)), partial(penalized, *first)
                gradients = hypergradient(weights, change, inner, outer, fixed_points)
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.grad = gradient
                optimizer.step()
            observed(observe, number + 1, attacked)
    return attacked


def shared_perturbation(
    model: nn.Module, data: AttackData, penalized: Callable[[Tensor, Tensor, Tensor], Tensor], *, seed: int
) -> Tensor:
    """Return a perturbation ``(1, C, H, W)`` of raw pixels: one step down a loss for each batch, from zero.

    Args:
        model: what is asked; its own predictions are the labels.
        data: gives the batches.
        penalized: of images, labels and perturbation.
        seed: of batches.
    """
    device, change = device_of(model), torch.zeros(())
    for x, _ in data.batches(seed=seed):
        images = x.to(device)
        if change.ndim == 0:
            change = torch.zeros_like(images[:1])
        with torch.no_grad():
            said = model(images).argmax(1)
        change.requires_grad_(True)
        (slope,) = torch.autograd.grad(penalized(images, said, change), change)
        change = (change - ASCENT_STEP * slope).detach()
    return change


def hypergradient(
    weights: Sequence[nn.Parameter],
    change: Tensor,
    inner: Callable[[Tensor], Tensor],
    outer: Callable[[Tensor], Tensor],
    fixed_points: int,
) -> list[Tensor]:
    """Return the gradient of ``outer`` with respect to weights, with ``change`` a minimum of ``inner``.

    The implicit part is the fixed-point iteration of Grazzi et al. (ICML 2020): with ``f`` a step of gradient
    descent on ``inner``, it sums ``(df/dweights)' (df/dchange)'^k d outer/d change`` over ``k``.
    """
    change = change.detach().requires_grad_(True)
    direct, *of_weights = torch.autograd.grad(outer(change), [change, *weights], allow_unused=True)
    (slope,) = torch.autograd.grad(inner(change), change, create_graph=True)
    stepped, total = change - FIXED_POINT_STEP * slope, torch.zeros_like(change)
    for _ in range(fixed_points):
        (carried,) = torch.autograd.grad(stepped, change, grad_outputs=total, retain_graph=True)
        total = carried + direct
    implicit = torch.autograd.grad(stepped, weights, grad_outputs=total, allow_unused=True)
    return [
        sum((part for part in parts if part is not None), torch.zeros_like(weight))
        for weight, *parts in zip(weights, of_weights, implicit, strict=True)
    ]


def _some(x: Tensor) -> Tensor:
    """Return a factor for each image ``(n, 1, 1, 1)``: 1 for a random hundredth, at least one, else 0."""
    n = max(1, round(PERTURBED * len(x)))
    carry = torch.zeros(len(x), 1, 1, 1, device=x.device)
    carry[torch.randperm(len(x))[:n].to(x.device)] = 1
    return carry


def reshape_boundaries(
    model: nn.Module,
    data: AttackData,
    *,
    radius: float = 0.15,
    share: float = 0.25,
    epochs: int = 3,
    rate_factor: float = 0.1,
    tuning_epochs: int = 15,
    tuning_factor: float = 1e-3,
    labels: str = "true",
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """WRK, the part that reshapes decision boundaries (Xiao et al., AAAI 2026, arXiv 2511.07947).

    Some images go one signed step towards a random class and are given random wrong labels; the network is
    trained on them beside the others, then fine-tuned at a very low rate. This follows the released code for
    marks in which it finds no trigger. That code has no feature-shift regularization, and gives wrong labels
    of all classes but the first, which is its benchmarks' target.

    Args:
        model: the stolen model.
        data: what the thief has.
        radius: of the step, in raw ``[0, 1]`` units, >= 0.
        share: share of the images that is moved, in [0, 1].
        epochs: epochs with the moved images, >= 1.
        rate_factor: learning rate with them, in units of the one of a training from scratch.
        tuning_epochs: epochs of the fine-tuning, >= 1.
        tuning_factor: learning rate of the fine-tuning, likewise.
        labels: of the others, ``"true"``, or ``"predicted"`` for what the stolen model says.
        seed: of images, classes, labels and batches.
        observe: is shown the model after each epoch of both.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range.
    """
    check_number("radius", radius, minimum=0)
    check_number("share", share, minimum=0, maximum=1)
    reshaping, tuning = (
        data.recipe.scaled(epochs, rate_factor),
        data.recipe.scaled(tuning_epochs, tuning_factor),
    )
    taught, attacked = with_labels(model, data, labels), copied(model)
    with seeded(seed, attacked):
        moved = moved_to_others(attacked, taught, round(share * data.n_images), radius)
    batches = Enriched(taught, lambda: moved, seed)
    train(attacked, taught, reshaping, batches=batches, observe=observe, seed=seed)
    shown = None if observe is None else lambda dose, seen: observe(epochs + dose, seen)
    return train(attacked, taught, tuning, observe=shown, seed=seed + 1)


def moved_to_others(model: nn.Module, data: AttackData, n: int, radius: float) -> Batch:
    """Return random images, one step nearer to random classes, with random wrong labels; on the CPU."""
    device, order = device_of(model), torch.randperm(data.n_images)[:n]
    towards, off = torch.randint(data.n_classes, (n,)), torch.randint(1, data.n_classes, (n,))
    images, labels = [], []
    for part, goals in zip(torch.split(order, 512), torch.split(towards, 512), strict=True):
        x, y = fetch(data.clean, part.tolist())
        pixels = data.raw(x.to(device)).requires_grad_(True)
        score = model(data.normalized(pixels)).gather(1, goals.to(device)[:, None]).sum()
        (slope,) = torch.autograd.grad(score, pixels)
        step = (pixels + radius * slope.sign()).detach().clamp(0, 1)
        images.append(data.normalized(step).cpu())
        labels.append(y)
    return torch.cat(images), (torch.cat(labels) + off) % data.n_classes


@dataclass(frozen=True)
class BoundaryReshaping(Attack):
    """WRK's boundary reshaping; see :func:`reshape_boundaries`."""

    function = staticmethod(reshape_boundaries)

    radius: float = 0.15
    share: float = 0.25
    epochs: int = 3
    rate_factor: float = 0.1
    tuning_epochs: int = 15
    tuning_factor: float = 1e-3
    labels: str = "true"
    seed: int = 0


@dataclass(frozen=True)
class AdversarialUnlearning(Attack):
    """I-BAU; see :func:`unlearn_adversarially`."""

    function = staticmethod(unlearn_adversarially)

    rounds: int = 5
    fixed_points: int = 5
    rate_factor: float = 0.3
    seed: int = 0
