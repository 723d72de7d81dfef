"""Unlearning of a perturbation that all images share."""

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
    observed,
    seeded,
)
from gradsigns_lightning.attacks.training import make_optimizer
from gradsigns_lightning.core.torch_state.contexts import twice_differentiable_kernels
from gradsigns_lightning.core.utils.checks import check_int

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


@dataclass(frozen=True)
class AdversarialUnlearning(Attack):
    """I-BAU; see :func:`unlearn_adversarially`."""

    function = staticmethod(unlearn_adversarially)

    rounds: int = 5
    fixed_points: int = 5
    rate_factor: float = 0.3
    seed: int = 0
