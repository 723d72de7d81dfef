"""Extraction: a new network learns from the stolen one's answers to the thief's images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    predictions,
    seeded,
)
from gradsigns_lightning.attacks.repair import train_adversarially
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.core.utils.checks import check_choice, check_number
from gradsigns_lightning.models import ResNet20, SmallResNet

ANSWERS, NETWORKS = ("probabilities", "labels"), ("same", "other")


def retrain(
    model: nn.Module,
    data: AttackData,
    *,
    network: Any = "same",
    answers: str = "probabilities",
    epochs: int = 60,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Train a new network on the stolen one's answers (Tramèr et al., USENIX Security 2016).

    As the Watermark-Robustness-Toolbox does it (Lukas et al., IEEE S&P 2022): the stolen model is asked once
    about each image, not augmented; the new network learns the answers from augmented images. The toolbox
    gives this thief all training images, and trains with SGD at 0.1; here they are ``data``'s, trained on by
    its recipe. With another network this is cross-architecture retraining; with images of other things in
    ``data``, whose labels are not looked at, it is Knockoff Nets with random selection (Orekondy et al., CVPR
    2019).

    Args:
        model: the stolen model.
        data: what the thief has.
        network: what is trained: ``"same"`` for the stolen model's architecture with random weights,
            ``"other"`` for a :class:`~gradsigns_lightning.models.ResNet20` (if that is what was stolen, a
            :class:`~gradsigns_lightning.models.SmallResNet` of width 32), a network that starts from the
            weights it has, or a function without arguments that makes one.
        answers: ``"probabilities"``, or ``"labels"`` if the model tells no more.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch, >= 0.
        seed: of the new weights and the batches.
        observe: is shown the new network after each epoch.

    Returns:
        The new network.

    Raises:
        TypeError: ``network`` is not one, and does not make one.
        ValueError: a setting is out of range, or the network does not answer with a score for each class.
    """
    taught = with_answers(model, data, answers)
    recipe = taught.recipe.scaled(epochs, rate_factor)
    return train(student(model, data, network, seed), taught, recipe, observe=observe, seed=seed)


def distill(
    model: nn.Module,
    data: AttackData,
    *,
    temperature: float = 3.0,
    alpha: float = 1.0,
    network: Any = "same",
    epochs: int = 60,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Distillation into a new network (Hinton et al., NeurIPS workshop 2014, arXiv 1503.02531).

    The student learns the stolen model's logits for each image, not augmented, divided by a temperature; and,
    where ``alpha`` < 1, its most likely class. The Watermark-Robustness-Toolbox averages the divergence over
    the classes, too; here, as in the paper, it is summed over them and multiplied by the squared temperature.
    Its SGD at 0.1 is the recipe's optimizer and rate here.

    Args:
        model: the stolen model.
        data: what the thief has.
        temperature: divides the logits of both, > 0.
        alpha: weight of the divergence from the stolen model; that of its most likely class is 1 - alpha.
        network: the student, as in :func:`retrain`.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch, >= 0.
        seed: of the new weights and the batches.
        observe: is shown the student after each epoch.

    Returns:
        The student.

    Raises:
        TypeError: ``network`` is not one, and does not make one.
        ValueError: a setting is out of range, or the network does not answer with a score for each class.
    """
    if not check_number("temperature", temperature, minimum=0):
        raise ValueError("`temperature` must be > 0, got 0.")
    check_number("alpha", alpha, minimum=0, maximum=1)
    recipe, taught = data.recipe.scaled(epochs, rate_factor), data.relabelled(predictions(model, data))

    def loss(trained: nn.Module, x: Tensor, logits: Tensor) -> Tensor:
        learnt = trained(x)
        ours, theirs = ((scores / temperature).log_softmax(1) for scores in (learnt, logits))
        divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
        return alpha * divergence + (1 - alpha) * F.cross_entropy(learnt, logits.argmax(1))

    learner = student(model, data, network, seed)
    return train(learner, taught, recipe, loss=loss, observe=observe, seed=seed)


def extract_adversarially(
    model: nn.Module,
    data: AttackData,
    *,
    radii: Sequence[float] = (0.01, 0.1, 0.25),
    step: float = 0.01,
    n_steps: int = 40,
    n_images: int = 1000,
    network: Any = "same",
    answers: str = "probabilities",
    epochs: int = 60,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Adversarial extraction (Watermark-Robustness-Toolbox; Lukas et al., IEEE S&P 2022).

    Retraining as in :func:`retrain`, and adversarial training at once: before each epoch, adversarial images
    of the new network are added, which are to be answered as the stolen model answers the images that they
    were made of; see :func:`train_adversarially`.

    Args:
        model: the stolen model.
        data: what the thief has.
        radii: largest change of a pixel, in raw ``[0, 1]`` units, each >= 0.
        step: of the ascent, in the same units, >= 0.
        n_steps: of the ascent, >= 1.
        n_images: images for each radius and epoch, at most those that the thief has, >= 1.
        network: what is trained, as in :func:`retrain`.
        answers: ``"probabilities"``, or ``"labels"`` if the model tells no more.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch, >= 0.
        seed: of the new weights, the images and the batches.
        observe: is shown the new network after each epoch.

    Returns:
        The new network.

    Raises:
        TypeError: ``network`` is not one, and does not make one.
        ValueError: a setting is out of range, or the network does not answer with a score for each class.
    """
    return train_adversarially(
        student(model, data, network, seed),
        with_answers(model, data, answers),
        radii=radii,
        step=step,
        n_steps=n_steps,
        n_images=n_images,
        labels="true",  # of the images as they are labelled now
        epochs=epochs,
        rate_factor=rate_factor,
        seed=seed,
        observe=observe,
    )


def with_answers(model: nn.Module, data: AttackData, answers: str) -> AttackData:
    """Return the thief's images with a model's ``"probabilities"`` or ``"labels"``.

    Probabilities are learnt as they are: the recipe then smooths no labels.

    Raises:
        ValueError: ``answers`` is neither.
    """
    check_choice("answers", answers, ANSWERS)
    logits = predictions(model, data)
    if answers == "labels":
        return data.relabelled(logits.argmax(1))
    return replace(data.relabelled(logits.softmax(1)), recipe=replace(data.recipe, label_smoothing=0.0))


def student(model: nn.Module, data: AttackData, network: Any, seed: int) -> nn.Module:
    """Return the network that is to learn, on the device of the stolen one; see :func:`retrain`.

    Raises:
        TypeError: ``network`` is not one, and does not make one.
        ValueError: ``network`` is an unknown word, or does not give ``(n, n_classes)``.
    """
    if isinstance(network, str):
        check_choice("network", network, NETWORKS)
    x = fetch(data.clean, [0])[0]
    with seeded(seed, model):
        made = _made(model, network, x.shape[1], data.n_classes)
    if not isinstance(made, nn.Module):
        raise TypeError(f"`network` must be or make a torch.nn.Module, got {type(made).__name__}.")
    made = copied(made).to(device_of(model))
    with torch.no_grad():
        shape = tuple(made(x.to(device_of(model))).shape)
    if shape != (1, data.n_classes):
        raise ValueError(f"`network` must answer an image with {data.n_classes} scores, got {shape}.")
    return made


def _made(model: nn.Module, network: Any, in_channels: int, n_classes: int) -> Any:
    if network == "same":
        return reset(copied(model))
    if network == "other":
        if any(isinstance(module, ResNet20) for module in model.modules()):
            return SmallResNet(in_channels, n_classes, width=32)
        return ResNet20(in_channels, n_classes)
    return network() if callable(network) and not isinstance(network, nn.Module) else network


@torch.no_grad()
def reset(model: nn.Module) -> nn.Module:
    """Give a network random weights, in place, and return it.

    Modules with ``reset_parameters`` do so; parameters of other modules are drawn from a normal distribution
    with the mean and standard deviation that they have.
    """
    for module in reversed(list(model.modules())):  # what holds others has the last word about them
        if callable(again := getattr(module, "reset_parameters", None)):
            again()
            continue
        for parameter in module.parameters(recurse=False):
            parameter.normal_(parameter.mean().item(), parameter.std(correction=0).item())
    return model


@dataclass(frozen=True)
class Retraining(Attack):
    """Retraining with stolen answers; see :func:`retrain`."""

    function = staticmethod(retrain)

    network: Any = "same"
    answers: str = "probabilities"
    epochs: int = 60
    rate_factor: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Distillation(Attack):
    """Distillation; see :func:`distill`."""

    function = staticmethod(distill)

    temperature: float = 3.0
    alpha: float = 1.0
    network: Any = "same"
    epochs: int = 60
    rate_factor: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class AdversarialExtraction(Attack):
    """Adversarial extraction; see :func:`extract_adversarially`."""

    function = staticmethod(extract_adversarially)

    radii: Sequence[float] = (0.01, 0.1, 0.25)
    step: float = 0.01
    n_steps: int = 40
    n_images: int = 1000
    network: Any = "same"
    answers: str = "probabilities"
    epochs: int = 60
    rate_factor: float = 1.0
    seed: int = 0
