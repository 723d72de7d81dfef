"""Fine-tuning with a pull on the weights: to zero, away from the old head, or back to the stolen ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradsigns_lightning.attacks.base import (
    Attack,
    AttackData,
    Observe,
    copied,
    device_of,
    fetch,
    last_layer,
    predictions,
    seeded,
)
from gradsigns_lightning.attacks.fine_tuning import with_labels
from gradsigns_lightning.attacks.training import cross_entropy, train
from gradsigns_lightning.core.utils.checks import check_int, check_number

HELD_OUT = 0.1  # share of the thief's images on which patience looks


def regularize(
    model: nn.Module,
    data: AttackData,
    *,
    decay: float = 0.1,
    decay_epochs: int = 5,
    epochs: int = 50,
    patience: int = 5,
    labels: str = "true",
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Shrink all weights, then fine-tune (Watermark-Robustness-Toolbox; Lukas et al., IEEE S&P 2022).

    In the first phase the loss has an L2 penalty, ``decay / 2`` times the sum of all squared parameters: the
    toolbox's weight decay under SGD. The second phase has a constant rate; it ends when the loss on a tenth
    of the thief's images, which are not trained on, has not fallen for some epochs, and the best epoch stays.
    The toolbox looks at its test images, and keeps the last epoch.

    Args:
        model: the stolen model.
        data: what the thief has.
        decay: strength of the penalty, >= 0.
        decay_epochs: epochs of the first phase, >= 1.
        epochs: largest number of epochs of the second phase, >= 1.
        patience: epochs without a fall of the loss after which the second phase ends, >= 1.
        labels: ``"true"``, or ``"predicted"`` for what the stolen model says.
        rate_factor: learning rate, in units of the one of a training from scratch.
        seed: of the held-out images and the batches.
        observe: is shown the model after each epoch of both phases.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range, or the thief has fewer than two images.
    """
    check_number("decay", decay, minimum=0)
    check_int("patience", patience, minimum=1)
    shrinking, recipe = (data.recipe.scaled(n, rate_factor) for n in (decay_epochs, epochs))
    kept, held_out = split(with_labels(model, data, labels), seed)
    attacked, plain = copied(model), cross_entropy(recipe.label_smoothing)

    def loss(trained: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        penalty = sum((p.square().sum() for p in trained.parameters()), torch.zeros((), device=x.device))
        return plain(trained, x, y) + decay / 2 * penalty

    train(attacked, kept, shrinking, loss=loss, observe=observe, seed=seed)
    best = Best(attacked, held_out, patience)
    shown = None if observe is None else lambda dose, seen: observe(decay_epochs + dose, seen)
    constant = replace(recipe, schedule="constant")
    train(attacked, kept, constant, stop=best.is_last, observe=shown, seed=seed + 1)
    attacked.load_state_dict(best.state)
    return attacked


class Best:
    """Keeps the state of a model at the lowest loss so far.

    Args:
        model: what is trained.
        held_out: images on which the loss is taken.
        patience: epochs without a fall after which training ends.
    """

    def __init__(self, model: nn.Module, held_out: AttackData, patience: int) -> None:
        self._model, self._held_out, self._patience = model, held_out, patience
        self._lowest, self._since = float("inf"), 0
        self.state: dict[str, Any] = {}

    def is_last(self) -> bool:
        """Look at the model after an epoch, and tell whether this was the last one."""
        labels = torch.cat([y for _, y in self._held_out.in_order()])
        loss = nn.functional.cross_entropy(predictions(self._model, self._held_out), labels).item()
        self._since += 1
        if loss < self._lowest or not self.state:
            self._lowest, self._since = loss, 0
            self.state = copy.deepcopy(self._model.state_dict())
        return self._since >= self._patience


def split(data: AttackData, seed: int) -> tuple[AttackData, AttackData]:
    """Return the thief's images without, and with only, a random tenth of them.

    Raises:
        ValueError: there are fewer than two images.
    """
    n = max(1, round(HELD_OUT * data.n_images))
    if n >= data.n_images:
        raise ValueError(f"`data` must hold at least two images, got {data.n_images}.")
    order = torch.randperm(data.n_images, generator=torch.Generator().manual_seed(seed))
    return data.part(order[n:]), data.part(order[:n])


def shift_features(
    model: nn.Module,
    data: AttackData,
    *,
    strength: float = 0.2,
    epochs: int = 10,
    rate_factor: float = 0.1,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """FST, feature shift tuning: a new head that must not resemble the old one (Min et al., NeurIPS 2023).

    The head is given random weights, the loss is the cross-entropy plus ``strength`` times the inner product
    of the head's weights with the stolen ones, and each step scales them back to the stolen norm. The
    features have to follow. The paper takes 10 epochs at a tenth of its training's rate, on 2 % of CIFAR-10.

    Args:
        model: the stolen model.
        data: what the thief has.
        strength: weight of the inner product (alpha), >= 0.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch.
        seed: of the new head and the batches.
        observe: is shown the model after each epoch.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range, or the model has no linear layer.
    """
    check_number("strength", strength, minimum=0)
    recipe, attacked = data.recipe.scaled(epochs, rate_factor), copied(model)
    head, plain = last_layer(attacked), cross_entropy(recipe.label_smoothing)
    stolen = head.weight.detach().clone()
    with seeded(seed, attacked):
        head.reset_parameters()

    def loss(trained: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return plain(trained, x, y) + strength * (head.weight * stolen).sum()

    @torch.no_grad()
    def project(step: int) -> None:
        head.weight.mul_(stolen.norm() / head.weight.norm().clamp_min(1e-12))

    return train(attacked, data, recipe, loss=loss, after_step=project, observe=observe, seed=seed)


def refit(
    model: nn.Module,
    data: AttackData,
    *,
    consolidation: float = 10.0,
    fisher_images: int = 1000,
    epochs: int = 36,
    rate_factor: float = 1.5,
    rate_decay: float = 0.9,
    labels: str = "true",
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """REFIT with elastic weight consolidation (Chen et al., AsiaCCS 2021).

    A high rate that falls each epoch moves the weights far from the stolen ones; a quadratic penalty,
    weighted by the diagonal Fisher information, holds back those on which the predictions depend. The paper
    takes 60 epochs on a fifth of the training set; these epochs show a thief's third as many images. Its
    further images, without labels, are left out.

    Args:
        model: the stolen model.
        data: what the thief has.
        consolidation: weight of the penalty, >= 0; 0 is REFIT without it, which the paper runs at a third of
            the rate.
        fisher_images: images from which the Fisher information is estimated, >= 1.
        epochs: epochs, >= 1.
        rate_factor: first learning rate, in units of the one of a training from scratch.
        rate_decay: the rate is multiplied by it after each epoch, in [0, 1].
        labels: ``"true"``, or ``"predicted"`` for what the stolen model says.
        seed: of the images and their drawn labels, and of batches.
        observe: is shown the model after each epoch.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range.
    """
    check_number("consolidation", consolidation, minimum=0)
    check_int("fisher_images", fisher_images, minimum=1)
    check_number("rate_decay", rate_decay, minimum=0, maximum=1)
    recipe, attacked = data.recipe.scaled(epochs, rate_factor), copied(model)
    weights = list(attacked.parameters())
    stolen, plain = [p.detach().clone() for p in weights], cross_entropy(recipe.label_smoothing)
    # A step of gradient descent on the penalty must not go beyond the stolen weight.
    most = 1 / max(recipe.rate * consolidation, 1e-12)
    fisher = [f.clamp_max(most) for f in fisher_information(attacked, data, fisher_images, seed)]

    def loss(trained: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        pull = sum(
            ((f * (p - s).square()).sum() for f, p, s in zip(fisher, weights, stolen, strict=True)),
            torch.zeros((), device=x.device),
        )
        return plain(trained, x, y) + consolidation / 2 * pull

    def rate_at(progress: float) -> float:
        return rate_decay ** int(progress * epochs)

    taught = with_labels(model, data, labels)
    return train(attacked, taught, recipe, loss=loss, rate_at=rate_at, observe=observe, seed=seed)


def fisher_information(model: nn.Module, data: AttackData, n_images: int, seed: int) -> Sequence[Tensor]:
    """Return the diagonal Fisher information of each parameter, the largest entry of all scaled to 1.

    Labels are drawn from the model's own predictions.
    """
    device, weights = device_of(model), list(model.parameters())
    sums = [torch.zeros_like(p) for p in weights]
    with seeded(seed, model):
        for item in torch.randperm(data.n_images)[:n_images].tolist():
            log_probabilities = model(fetch(data.clean, [item])[0].to(device)).log_softmax(1)
            label = torch.multinomial(log_probabilities.detach().exp(), 1)
            gradients = torch.autograd.grad(
                log_probabilities.gather(1, label).sum(), weights, allow_unused=True
            )
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient.square()
    largest = torch.stack([total.max() for total in sums]).max().clamp_min(1e-30)
    return [total / largest for total in sums]


@dataclass(frozen=True)
class Regularization(Attack):
    """Shrinking, then fine-tuning; see :func:`regularize`."""

    function = staticmethod(regularize)

    decay: float = 0.1
    decay_epochs: int = 5
    epochs: int = 50
    patience: int = 5
    labels: str = "true"
    rate_factor: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class FeatureShift(Attack):
    """Feature shift tuning; see :func:`shift_features`."""

    function = staticmethod(shift_features)

    strength: float = 0.2
    epochs: int = 10
    rate_factor: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Refit(Attack):
    """REFIT; see :func:`refit`."""

    function = staticmethod(refit)

    consolidation: float = 10.0
    fisher_images: int = 1000
    epochs: int = 36
    rate_factor: float = 1.5
    rate_decay: float = 0.9
    labels: str = "true"
    seed: int = 0
