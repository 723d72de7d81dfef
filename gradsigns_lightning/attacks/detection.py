"""Detection: the thief looks for the class that carries the mark, and turns its gradient alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe
from gradsigns_lightning.attacks.class_gradients import ClassImages, View, directions
from gradsigns_lightning.attacks.rotation import rotate
from gradsigns_lightning.attacks.twins import train_twin
from gradsigns_lightning.core.utils.checks import check_int

_MAD = 1.4826  # median absolute deviations of a normal variable to its standard deviation


def rotate_suspect(
    model: nn.Module,
    data: AttackData,
    *,
    n_images: int = 1024,
    twin: bool = False,
    strength: float = 3.0,
    every_n_steps: int = 5,
    epochs: int = 5,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Find the class that carries the mark, then turn its gradient (adaptive; this project).

    The class is that of :func:`suspect_class`, the rest is :func:`rotate`.

    Args:
        model: the stolen model; its operations must have second derivatives.
        data: what the thief has.
        n_images: most images of each class that are looked at, >= 2.
        twin: compare with the thief's own unmarked network, which is trained from scratch, both to find the
            class and to turn its gradient.
        strength: see :func:`rotate`.
        every_n_steps: see :func:`rotate`.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch, > 0.
        seed: of batches, choices and the twin.
        observe: is shown the model after each epoch.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range, or the thief has no image of a class.
    """
    suspect, _ = suspect_class(model, data, n_images=n_images, twin=twin, seed=seed)
    return rotate(
        model,
        data,
        target_class=suspect,
        strength=strength,
        every_n_steps=every_n_steps,
        twin=twin,
        epochs=epochs,
        rate_factor=rate_factor,
        seed=seed,
        observe=observe,
    )


@dataclass(frozen=True)
class SuspectRotation(Attack):
    """Detection of the class and rotation; see :func:`rotate_suspect`."""

    function = staticmethod(rotate_suspect)

    n_images: int = 1024
    twin: bool = False
    strength: float = 3.0
    every_n_steps: int = 5
    epochs: int = 5
    rate_factor: float = 1.0
    seed: int = 0


def suspect_class(
    model: nn.Module, data: AttackData, *, n_images: int = 1024, twin: bool = False, seed: int = 0
) -> tuple[int, float]:
    """Return the class whose input gradients agree most, and by how much they do.

    A mark aligns the gradients of a class's images: the mean of their directions grows.

    Args:
        model: the stolen model.
        data: what the thief has.
        n_images: most images of each class that are looked at, >= 2.
        twin: take off what the thief's own unmarked network, trained from scratch, has of it.
        seed: of the choice of images and of the twin.

    Returns:
        The class, and its z-score: how far its :func:`concentrations` lies above the median of all classes,
        in standard deviations, estimated by the median absolute deviation.

    Raises:
        ValueError: the thief has no two images of a class.
    """
    images = ClassImages(data, seed=seed)
    found = concentrations(model, data, images, n_images=n_images)
    if twin:
        found = found - concentrations(train_twin(model, data, seed=seed), data, images, n_images=n_images)
    above = found - found.median()
    scores = above / (_MAD * above.abs().median()).clamp(min=1e-12)
    return int(scores.argmax()), float(scores.max())


def concentrations(model: nn.Module, data: AttackData, images: ClassImages, *, n_images: int) -> Tensor:
    """Return how far the input gradients of each class's images agree: their mean cosine, ``(n_classes,)``.

    The mean is over pairs of different images.

    Raises:
        ValueError: ``n_images`` is below 2, or the thief has no two images of a class.
    """
    check_int("n_images", n_images, minimum=2)
    return torch.tensor(
        [_mean_cosine(model, data, images.of(c, n_images), c) for c in range(data.n_classes)],
        dtype=torch.float64,
    )


def _mean_cosine(model: nn.Module, data: AttackData, inputs: Tensor, class_index: int) -> float:
    n = len(inputs)
    if n < 2:
        raise ValueError(f"`data` must have two images of class {class_index}, got one.")
    view = View(class_index, class_index)
    total = torch.stack(
        [directions(model, part, view, data).sum(0) for part in torch.split(inputs, 128)]
    ).sum(0)
    return float((total @ total - n) / (n * (n - 1)))
