"""Rotation: an adaptive thief turns the mean input gradients away from what they were in the stolen model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, Recipe, copied
from gradsigns_lightning.attacks.class_gradients import (
    ClassImages,
    View,
    directions,
    mean_direction,
    views_of,
)
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.attacks.twins import train_twin
from gradsigns_lightning.core.utils.checks import check_int, check_number


def rotate(
    model: nn.Module,
    data: AttackData,
    *,
    target: str = "class",
    target_class: int = 0,
    strength: float = 3.0,
    every_n_steps: int = 5,
    n_views: int = 10,
    n_images: int = 32,
    twin: bool = False,
    epochs: int = 5,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Fine-tune, and turn mean input gradients away from what they were (adaptive; this project).

    A mark of this project stands in the mean direction u of a class's input gradients. The thief needs no
    key: many other directions serve as well. In every ``every_n_steps``-th step the gradient of the penalty
    ``|cos(u, u0)|`` joins that of the task, ``strength`` times as long, times the mean penalty that is left,
    so that the push ends where the old direction is gone. (With ``relu(cos)`` it overshoots: the mark comes
    out inverted, which a two-sided test would read.)

    Args:
        model: the stolen model; its operations must have second derivatives.
        data: what the thief has.
        target: whose gradients: ``"class"`` (of one class), ``"classes"`` (of each class), ``"pairs"`` (over
            the images of each class, towards each class) or ``"mixtures"`` (over the images of each class, of
            random mixtures of logits).
        target_class: the class of ``"class"``.
        strength: length of the penalty's gradient, in lengths of the task's, where nothing is turned yet,
            >= 0.
        every_n_steps: optimizer steps from one push to the next, >= 1.
        n_views: most mean gradients that one push turns, drawn at random, >= 1.
        n_images: images for each, >= 1.
        twin: leave out of u0 what the thief's own unmarked network has of it, which is trained from scratch.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch, > 0.
        seed: of batches, choices and the twin.
        observe: is shown the model after each epoch.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range, or the thief has no image of a class.
    """
    usual = train_twin(model, data, seed=seed) if twin else None
    return turn_away(
        model,
        data,
        [model],
        views_of(target, target_class, data.n_classes, seed=seed),
        Dose(strength, every_n_steps, n_views, n_images),
        replace(
            data.recipe,
            epochs=epochs,
            rate=data.recipe.rate * check_number("rate_factor", rate_factor, minimum=0),
        ),
        usual=usual,
        observe=observe,
        seed=seed,
    )


@dataclass(frozen=True)
class Rotation(Attack):
    """Rotation; see :func:`rotate`."""

    function = staticmethod(rotate)

    target: str = "class"
    target_class: int = 0
    strength: float = 3.0
    every_n_steps: int = 5
    n_views: int = 10
    n_images: int = 32
    twin: bool = False
    epochs: int = 5
    rate_factor: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Dose:
    """How hard and how often is pushed; see :func:`rotate`."""

    strength: float
    every_n_steps: int
    n_views: int = 10
    n_images: int = 32

    def __post_init__(self) -> None:
        check_number("strength", self.strength, minimum=0)
        check_int("every_n_steps", self.every_n_steps, minimum=1)
        check_int("n_views", self.n_views, minimum=1)
        check_int("n_images", self.n_images, minimum=1)


def turn_away(
    model: nn.Module,
    data: AttackData,
    origins: Sequence[nn.Module],
    views: Sequence[View],
    dose: Dose,
    recipe: Recipe,
    *,
    usual: nn.Module | None = None,
    observe: Observe | None = None,
    seed: int = 0,
) -> nn.Module:
    """Fine-tune a copy of ``model``, and turn its views away from what they are in each of ``origins``.

    Args:
        model: from where the training goes on.
        data: what the thief has.
        origins: networks whose directions are to be left.
        views: whose mean gradients are turned.
        dose: how hard and how often.
        recipe: of the training.
        usual: an unmarked network, whose directions may stay.
        observe: is shown the model after each epoch.
        seed: of batches and choices.
    """
    images, attacked = ClassImages(data, seed=seed), copied(model)
    directions_left = [_Origin(copied(origin), usual, images, data) for origin in origins]
    push = _Push(attacked, views, directions_left, images, data, dose, seed=seed)
    return train(attacked, data, recipe, before_step=push, observe=observe, seed=seed)


class _Origin:
    """The views' mean directions in a network, less the usual one's; each is computed when asked for."""

    def __init__(
        self, model: nn.Module, usual: nn.Module | None, images: ClassImages, data: AttackData
    ) -> None:
        self._model, self._usual, self._images, self._data = model, usual, images, data
        self._known: dict[View, Tensor] = {}

    def __getitem__(self, view: View) -> Tensor:
        if view not in self._known:
            self._known[view] = self._direction(view)
        return self._known[view]

    def _direction(self, view: View) -> Tensor:
        own = mean_direction(self._model, self._images, view, self._data)
        if self._usual is None:
            return own
        usual = F.normalize(mean_direction(self._usual, self._images, view, self._data), dim=0)
        return own - (own @ usual) * usual


class _Push:
    """Adds the penalty's gradient to that of the task, right before a step is taken."""

    def __init__(
        self,
        model: nn.Module,
        views: Sequence[View],
        origins: Sequence[_Origin],
        images: ClassImages,
        data: AttackData,
        dose: Dose,
        *,
        seed: int,
    ) -> None:
        self._model, self._views, self._origins = model, views, origins
        self._images, self._data, self._dose = images, data, dose
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, step: int) -> None:
        if step % self._dose.every_n_steps:
            return
        parameters = [p for p in self._model.parameters() if p.grad is not None]
        pushes = [torch.zeros_like(p) for p in parameters]
        drawn = torch.randperm(len(self._views), generator=self._generator)[: self._dose.n_views].tolist()
        left = 0.0
        for view in (self._views[number] for number in drawn):
            cosine = self._cosine(view)
            left += float(cosine.detach()) / len(drawn)
            # One view's graph at a time is in memory.
            for push, part in zip(
                pushes, torch.autograd.grad(cosine, parameters, allow_unused=True), strict=True
            ):
                push += 0 if part is None else part
        task = _length([p.grad for p in parameters if p.grad is not None])
        factor = self._dose.strength * left * task / _length(pushes).clamp(min=1e-12)
        for parameter, push in zip(parameters, pushes, strict=True):
            assert parameter.grad is not None
            parameter.grad += factor * push

    def _cosine(self, view: View) -> Tensor:
        inputs = self._images.of(view.images, self._dose.n_images, augmented=True)
        mean = directions(self._model, inputs, view, self._data, create_graph=True).mean(0)
        cosines = [F.cosine_similarity(mean, origin[view], dim=0) for origin in self._origins]
        return torch.stack(cosines).abs().mean()


def _length(gradients: list[Tensor]) -> Tensor:
    length: Tensor = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    return length
