"""Rotation: an adaptive thief turns the mean input gradients away from what they were in the stolen model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, copied, seeded
from gradsigns_lightning.attacks.class_gradients import (
    ClassImages,
    View,
    directions,
    mean_direction,
    views_of,
)
from gradsigns_lightning.attacks.training import train
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
    views = views_of(target, target_class, data.n_classes, seed=seed)
    recipe = replace(
        data.recipe,
        epochs=epochs,
        rate=data.recipe.rate * check_number("rate_factor", rate_factor, minimum=0),
    )
    attacked, images = copied(model), ClassImages(data, seed=seed)
    from_scratch = train(reinitialized(model, seed=seed), data, data.recipe, seed=seed) if twin else None
    turning = _Turning(
        attacked,
        images,
        views,
        data,
        References(copied(model), images, data, from_scratch),
        check_number("strength", strength, minimum=0),
        check_int("n_images", n_images, minimum=1),
        check_int("n_views", n_views, minimum=1),
        check_int("every_n_steps", every_n_steps, minimum=1),
        torch.Generator().manual_seed(seed),
    )
    return train(attacked, data, recipe, before_step=turning, observe=observe, seed=seed)


class References:
    """The views' directions in the stolen model, each computed when it is first asked for."""

    def __init__(self, stolen, images, data, twin=None):
        self._stolen, self._images, self._data, self._twin = stolen, images, data, twin
        self._known: dict[View, Tensor] = {}

    def __getitem__(self, view: View) -> Tensor:
        if view not in self._known:
            own = F.normalize(mean_direction(self._stolen, self._images, view, self._data), dim=0)
            if self._twin is not None:
                usual = F.normalize(mean_direction(self._twin, self._images, view, self._data), dim=0)
                own = F.normalize(own - (own @ usual) * usual, dim=0)
            self._known[view] = own
        return self._known[view]


MODE = "rel"
PLAIN = False


@dataclass
class _Turning:
    model: nn.Module
    images: ClassImages
    views: Sequence[View]
    data: AttackData
    references: References
    strength: float
    n_images: int
    n_views: int
    every_n_steps: int
    generator: torch.Generator

    def __call__(self, step: int) -> None:
        if step % self.every_n_steps:
            return
        chosen = torch.randperm(len(self.views), generator=self.generator)[: self.n_views]
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        total = [torch.zeros_like(p) for p in parameters]
        for item in chosen.tolist():
            view = self.views[item]
            inputs = self.images.of(view.images, self.n_images, augmented=True)
            mean = directions(self.model, inputs, view, self.data, create_graph=True).mean(0)
            penalty = F.relu(F.cosine_similarity(mean, self.references[view], dim=0))
            for sum_, part in zip(total, torch.autograd.grad(penalty, parameters, allow_unused=True)):
                if part is not None:
                    sum_ += part
        factor = self.strength
        if MODE == "rel":
            own = sum(t.square().sum() for t in total).sqrt()
            task = sum(p.grad.square().sum() for p in parameters).sqrt()
            factor = self.strength * task / own.clamp(min=1e-12)
        for p, t in zip(parameters, total):
            p.grad += factor * t


def reinitialized(model: nn.Module, *, seed: int = 0) -> nn.Module:
    fresh = copied(model)
    with seeded(seed, fresh), torch.no_grad():
        reached: set[int] = set()
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
                reached |= {id(p) for p in module.parameters(recurse=False)}
        for p in fresh.parameters():
            if id(p) not in reached and p.ndim > 1:
                p.normal_(std=0.02)
    return fresh
