"""The training loop that the attacks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader

from gradsigns_lightning.attacks.base import AttackData, Observe, Recipe, device_of, observed, seeded

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # of model, inputs and labels


def train(
    model: nn.Module,
    data: AttackData,
    recipe: Recipe,
    *,
    loss: Loss | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
    batches: Iterable[Any] | None = None,
    frozen: Iterable[nn.Module] = (),
    before_step: Callable[[int], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    rate_at: Callable[[float], float] | None = None,
    stop: Callable[[], bool] | None = None,
    observe: Observe | None = None,
    seed: int = 0,
) -> nn.Module:
    """Train a model in place, and return it in evaluation mode.

    Args:
        model: what is trained.
        data: the thief's images.
        recipe: how; its ``rate`` is the schedule's highest.
        loss: of model, inputs ``(n, C, H, W)`` and labels ``(n,)``; by default the cross-entropy with the
            recipe's label smoothing.
        parameters: those that are trained; by default all that require gradients.
        batches: gives the batches of each epoch; by default those of ``data``, shuffled and augmented.
        frozen: modules that stay in evaluation mode.
        before_step: is called with the number of optimizer steps so far when a step's gradients are there.
        after_step: is called with the number of optimizer steps so far after each.
        rate_at: gives the rate, as a share of the recipe's, at a share of the steps, in [0, 1]; it takes the
            place of the recipe's schedule.
        stop: is asked after each epoch whether this was the last one.
        observe: is shown the model after each epoch; the dose is the number of epochs.
        seed: of batches, dropout and augmentation.
    """
    device, step = device_of(model), 0
    loss = loss or cross_entropy(recipe.label_smoothing)
    batches = data.batches(recipe.batch_size, seed=seed) if batches is None else batches
    chosen = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
    optimizer = make_optimizer(chosen, recipe)
    schedule = make_schedule(optimizer, recipe, recipe.epochs * _length(batches), rate_at)
    with seeded(seed, model):
        for epoch in range(recipe.epochs):
            _train_mode(model, frozen)
            for x, y in batches:
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss(model, x.to(device), y.to(device)))
                if before_step is not None:
                    before_step(step)
                optimizer.step()
                schedule.step()
                step += 1
                if after_step is not None:
                    after_step(step)
            observed(observe, epoch + 1, model)
            if stop is not None and stop():
                break
    return model.eval()


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """Return the cross-entropy as a :data:`Loss`."""
    return lambda model, x, y: F.cross_entropy(model(x), y, label_smoothing=label_smoothing)


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> Optimizer:
    """Return the recipe's optimizer."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, recipe.rate, momentum=0.9, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(parameters, recipe.rate, weight_decay=recipe.weight_decay)


def make_schedule(
    optimizer: Optimizer, recipe: Recipe, n_steps: int, rate_at: Callable[[float], float] | None = None
) -> LRScheduler:
    """Return the recipe's schedule over ``n_steps`` optimizer steps, or the one that ``rate_at`` gives."""
    if rate_at is not None:
        return LambdaLR(optimizer, lambda step: rate_at(step / n_steps))
    if recipe.schedule == "onecycle":
        return OneCycleLR(optimizer, recipe.rate, total_steps=n_steps + 1)
    if recipe.schedule == "cosine":
        return CosineAnnealingLR(optimizer, n_steps)
    return ConstantLR(optimizer, factor=1.0, total_iters=0)


def _train_mode(model: nn.Module, frozen: Iterable[nn.Module]) -> None:
    model.train()
    for module in frozen:
        module.eval()


def _length(batches: Any) -> int:
    if isinstance(batches, DataLoader) or hasattr(batches, "__len__"):
        return len(batches)
    raise TypeError(f"`batches` must say how many they are, got {type(batches).__name__} without a length.")
