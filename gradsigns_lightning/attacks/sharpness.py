"""Fine-tuning with sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, copied
from gradsigns_lightning.attacks.training import Loss, cross_entropy, train
from gradsigns_lightning.core.torch_state.snapshot import side_effects_undone
from gradsigns_lightning.core.utils.checks import check_number


def fine_tune_with_sam(
    model: nn.Module,
    data: AttackData,
    *,
    radius: float = 2.0,
    epochs: int = 15,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """FT-SAM: fine-tune with adaptive sharpness-aware minimization (Zhu et al., ICCV 2023).

    Each step follows the gradient at the weights ``w + radius w^2 g / |w g|``, where ``g`` is the gradient at
    ``w``: large weights, in which backdoors live, are moved most. Running statistics see the unperturbed pass
    alone. The paper takes 100 epochs on a twentieth of the training set, at the rate of its training; these
    epochs show a thief's third as many images.

    Args:
        model: the stolen model.
        data: what the thief has.
        radius: of the perturbation, relative to the weights, >= 0.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch.
        seed: of batches.
        observe: is shown the model after each epoch.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range.
    """
    check_number("radius", radius, minimum=0)
    recipe, attacked = data.recipe.scaled(epochs, rate_factor), copied(model)
    loss, before_step = sharpness_aware(
        cross_entropy(recipe.label_smoothing), attacked, list(attacked.parameters()), radius
    )
    return train(attacked, data, recipe, loss=loss, before_step=before_step, observe=observe, seed=seed)


def sharpness_aware(
    loss: Loss, model: nn.Module, parameters: Sequence[nn.Parameter], radius: float
) -> tuple[Loss, Callable[[int], None]]:
    """Return the loss and the ``before_step`` of :func:`train` that replace gradients by those uphill.

    Args:
        loss: what is minimized.
        model: what is trained.
        parameters: those that are perturbed.
        radius: of the perturbation.
    """
    batch: list[Tensor] = []

    def remembered(trained: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        batch[:] = x, y
        return loss(trained, x, y)

    def before_step(step: int) -> None:
        with uphill(parameters, radius), side_effects_undone(model):
            for parameter in parameters:
                parameter.grad = None
            torch.autograd.backward(loss(model, *batch))

    return remembered, before_step


@contextmanager
def uphill(parameters: Sequence[nn.Parameter], radius: float) -> Iterator[None]:
    """Perturb parameters along their gradients, adaptively (Kwon et al., ICML 2021), and put them back."""
    with torch.no_grad():
        kept = [(p, p.clone(), p.grad) for p in parameters if p.grad is not None]
        norm = torch.stack([(p * g).norm() for p, _, g in kept]).norm() + 1e-12
        for p, _, g in kept:
            p.add_(p.square() * g, alpha=float(radius / norm))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, before, _ in kept:
                p.copy_(before)


@dataclass(frozen=True)
class SharpnessAware(Attack):
    """FT-SAM; see :func:`fine_tune_with_sam`."""

    function = staticmethod(fine_tune_with_sam)

    radius: float = 2.0
    epochs: int = 15
    rate_factor: float = 1.0
    seed: int = 0
