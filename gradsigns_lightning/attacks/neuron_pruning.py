"""Repairs of backdoored networks by pruning few neurons, turned against a watermark."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, Recipe, copied
from gradsigns_lightning.attacks.neuron_masks import NeuronMasks, prune_neurons
from gradsigns_lightning.attacks.recovery import accuracy, few
from gradsigns_lightning.attacks.training import Loss, train
from gradsigns_lightning.core.utils.checks import check_int, check_number

BATCH_SIZE = 128  # of both papers
LARGEST_GRADIENT = 20.0  # in the unlearning, as the authors' code means to


def prune_adversarially(
    model: nn.Module,
    data: AttackData,
    *,
    noise: float = 0.4,
    clean_share: float = 0.2,
    n_images: int = 500,
    n_steps: int = 2000,
    mask_rate: float = 0.2,
    threshold: float = 0.9,
    tolerance: float = 0.03,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Prune the neurons that are sensitive to adversarial noise (ANP, Wu and Wang, NeurIPS 2021).

    Masks in [0, 1] on the neurons are trained, by SGD, to lower the cross-entropy while the neurons' weights
    and biases are scaled by the noise, one sign step, that raises it most. Neurons then go in the order of
    their masks as long as the accuracy on the thief's images holds.

    Args:
        model: the stolen model.
        data: what the thief has.
        noise: its largest size, relative to the weights, >= 0; the authors' ``eps``.
        clean_share: weight of the loss without noise, in [0, 1]; their ``alpha``.
        n_images: images on which masks are trained, >= 1; all where the thief has fewer.
        n_steps: steps of the masks' training, >= 1.
        mask_rate: learning rate of the masks, which have no scale but their own, >= 0.
        threshold: the highest mask of a neuron that is pruned, in [0, 1].
        tolerance: what the accuracy on the thief's images may fall by, in [0, 1].
        seed: of images, batches and noise.
        observe: is shown the pruned model at each share of neurons, in steps of one percent.

    Returns:
        The pruned copy.

    Raises:
        ValueError: a setting is out of range.
    """
    check_number("noise", noise, minimum=0)
    check_number("clean_share", clean_share, minimum=0, maximum=1)
    check_int("n_steps", n_steps, minimum=1)
    check_number("mask_rate", mask_rate, minimum=0)
    check_number("threshold", threshold, minimum=0, maximum=1)
    check_number("tolerance", tolerance, minimum=0, maximum=1)
    some = _few_in_large_batches(data, n_images, seed)
    n_epochs = math.ceil(n_steps / len(some.batches(seed=seed)))
    recipe = _mask_recipe(some.recipe, n_epochs, mask_rate)
    masked = NeuronMasks(model)
    loss = _adversarial_loss(masked, noise, clean_share)
    train(masked, some, recipe, loss=loss, after_step=masked.clamp, seed=seed)
    return prune_neurons(
        model, data, list(masked.masks), threshold=threshold, tolerance=tolerance, observe=observe
    )


@dataclass(frozen=True)
class AdversarialNeuronPruning(Attack):
    """Adversarial neuron pruning; see :func:`prune_adversarially`."""

    function = staticmethod(prune_adversarially)

    noise: float = 0.4
    clean_share: float = 0.2
    n_images: int = 500
    n_steps: int = 2000
    mask_rate: float = 0.2
    threshold: float = 0.9
    tolerance: float = 0.03
    seed: int = 0


def prune_reconstructively(
    model: nn.Module,
    data: AttackData,
    *,
    n_images: int = 500,
    unlearn_epochs: int = 20,
    unlearn_rate: float = 0.01,
    unlearned: float = 0.2,
    recover_epochs: int = 20,
    mask_rate: float = 0.2,
    loss_weight: float = 0.2,
    threshold: float = 0.9,
    tolerance: float = 0.03,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Unlearn clean images, recover them by masks, prune what was masked (RNP, Li et al., ICML 2023).

    A copy is trained to be wrong on few images until it is; then masks in [0, 1] on its neurons are trained
    to make it right again. Neurons with small masks are pruned in the stolen model, as by
    :func:`prune_adversarially`.

    Args:
        model: the stolen model.
        data: what the thief has.
        n_images: images on which masks are trained, >= 1; all where the thief has fewer.
        unlearn_epochs: most epochs of the unlearning, >= 1.
        unlearn_rate: learning rate of the unlearning, by SGD, >= 0.
        unlearned: the accuracy at which the unlearning stops, in [0, 1].
        recover_epochs: epochs of the masks' training, >= 1.
        mask_rate: learning rate of the masks, >= 0.
        loss_weight: factor of the masks' loss, >= 0; the authors' ``alpha``.
        threshold: the highest mask of a neuron that is pruned, in [0, 1].
        tolerance: what the accuracy on the thief's images may fall by, in [0, 1].
        seed: of images and batches.
        observe: is shown the pruned model at each share of neurons, in steps of one percent.

    Returns:
        The pruned copy.

    Raises:
        ValueError: a setting is out of range.
    """
    check_int("unlearn_epochs", unlearn_epochs, minimum=1)
    check_number("unlearn_rate", unlearn_rate, minimum=0)
    check_int("recover_epochs", recover_epochs, minimum=1)
    check_number("mask_rate", mask_rate, minimum=0)
    check_number("unlearned", unlearned, minimum=0, maximum=1)
    check_number("loss_weight", loss_weight, minimum=0)
    check_number("threshold", threshold, minimum=0, maximum=1)
    check_number("tolerance", tolerance, minimum=0, maximum=1)
    some = _few_in_large_batches(data, n_images, seed)
    wrong = _unlearned(model, some, unlearn_epochs, unlearn_rate, unlearned, seed)
    masked = NeuronMasks(wrong)
    train(
        masked,
        some,
        _mask_recipe(some.recipe, recover_epochs, mask_rate),
        loss=lambda network, x, y: loss_weight * F.cross_entropy(network(x), y),
        after_step=masked.clamp,
        seed=seed,
    )
    return prune_neurons(
        model, data, list(masked.masks), threshold=threshold, tolerance=tolerance, observe=observe
    )


@dataclass(frozen=True)
class ReconstructiveNeuronPruning(Attack):
    """Reconstructive neuron pruning; see :func:`prune_reconstructively`."""

    function = staticmethod(prune_reconstructively)

    n_images: int = 500
    unlearn_epochs: int = 20
    unlearn_rate: float = 0.01
    unlearned: float = 0.2
    recover_epochs: int = 20
    mask_rate: float = 0.2
    loss_weight: float = 0.2
    threshold: float = 0.9
    tolerance: float = 0.03
    seed: int = 0


def _few_in_large_batches(data: AttackData, n_images: int, seed: int) -> AttackData:
    # Both count their steps at this size of batch.
    return few(replace(data, recipe=replace(data.recipe, batch_size=BATCH_SIZE)), n_images, seed=seed)


def _mask_recipe(recipe: Recipe, epochs: int, rate: float) -> Recipe:
    return replace(recipe, epochs=epochs, rate=rate, optimizer="sgd", schedule="constant", weight_decay=0.0)


def _adversarial_loss(masked: NeuronMasks, size: float, clean_share: float) -> Loss:
    """Return the loss of masks, without noise and with the noise that raises it most."""

    def loss(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        noisy = F.cross_entropy(masked(x, _worst_noise(masked, x, y, size)), y)
        return clean_share * F.cross_entropy(masked(x), y) + (1 - clean_share) * noisy

    return loss


def _worst_noise(masked: NeuronMasks, x: Tensor, y: Tensor, size: float) -> list[Tensor]:
    """Return noise for masks and biases: one sign step from a random start, within ``[-size, size]``."""
    start = [(2 * torch.rand_like(mask) - 1) * size for mask in (*masked.masks, *masked.masks)]
    start = [noise.requires_grad_(True) for noise in start]
    loss = F.cross_entropy(masked(x, start), y)
    slopes = torch.autograd.grad(loss, start, allow_unused=True, materialize_grads=True)
    return [
        (noise + size * slope.sign()).clamp(-size, size).detach()
        for noise, slope in zip(start, slopes, strict=True)
    ]


def _unlearned(
    model: nn.Module, data: AttackData, epochs: int, rate: float, enough: float, seed: int
) -> nn.Module:
    """Return a copy that has been trained to be wrong, until no more than a share ``enough`` is right."""
    wrong = copied(model)
    recipe = replace(data.recipe, epochs=1, rate=rate, optimizer="sgd", schedule="constant")

    def clip(_: int) -> None:
        nn.utils.clip_grad_norm_(wrong.parameters(), LARGEST_GRADIENT)

    for epoch in range(epochs):
        train(wrong, data, recipe, loss=_confusion, before_step=clip, seed=seed + epoch)
        if accuracy(wrong, data) <= enough:
            break
    return wrong


def _confusion(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return -F.cross_entropy(network(x), y)
