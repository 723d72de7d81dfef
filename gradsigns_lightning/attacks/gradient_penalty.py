"""Input-gradient penalty: the thief makes the input gradients small, and with them what is written there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, copied
from gradsigns_lightning.attacks.training import cross_entropy, train
from gradsigns_lightning.core.torch_state.contexts import twice_differentiable_kernels
from gradsigns_lightning.core.utils.checks import check_number


def penalize_gradients(
    model: nn.Module,
    data: AttackData,
    *,
    strength: float = 0.05,
    epochs: int = 5,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Fine-tune with a penalty on the length of input gradients: double backpropagation.

    By Drucker and LeCun (IEEE Transactions on Neural Networks, 1992); Ross and Doshi-Velez (AAAI 2018) take
    it as a defence against adversarial examples. The gradient is that of the training's own loss, with label
    smoothing, by the normalized input, in the same forward pass.

    Args:
        model: the stolen model; its operations must have second derivatives.
        data: what the thief has.
        strength: of the mean over images of the squared length of an image's input gradient, >= 0.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch, > 0.
        seed: of batches.
        observe: is shown the model after each epoch.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range.
    """
    check_number("strength", strength, minimum=0)
    recipe = replace(
        data.recipe,
        epochs=epochs,
        rate=data.recipe.rate * check_number("rate_factor", rate_factor, minimum=0),
    )
    task = cross_entropy(recipe.label_smoothing)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with twice_differentiable_kernels(model, x.device.type):
            inputs = x.detach().requires_grad_(True)
            value = task(model, inputs, y)
            (gradient,) = torch.autograd.grad(value * len(x), inputs, create_graph=True)
        return value + strength * gradient.square().sum() / len(x)

    return train(copied(model), data, recipe, loss=loss, observe=observe, seed=seed)


@dataclass(frozen=True)
class GradientPenalty(Attack):
    """Input-gradient penalty; see :func:`penalize_gradients`."""

    function = staticmethod(penalize_gradients)

    strength: float = 0.05
    epochs: int = 5
    rate_factor: float = 1.0
    seed: int = 0
