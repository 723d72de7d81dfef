"""Central differences of the loss: first derivatives only, for smooth networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradsigns_lightning.core.engines.base import EmbeddingLoss, ObjectiveFn, objective_gradient, with_value
from gradsigns_lightning.core.signature import LogitsFn, class_logits, input_gradients, target_loss
from gradsigns_lightning.core.torch_state.contexts import twice_differentiable_kernels

# Relative to the images' length. Smaller steps are lost in float32's rounding, larger ones in the third
# derivative.
STEP = 0.01


class FiniteDifference:
    """Takes a central difference of the loss for the directional derivative along the objective's derivative.

    It needs no second derivative of any kernel. It is accurate to about 1e-3 in float32 on smooth activations
    (GELU, SiLU, tanh), but wrong at every step size, and therefore refused, on kinked ones (ReLU, max
    pooling).

    Args:
        step: length of the step, relative to the images' root-mean-square length; positive.
    """

    name = "finite_difference"
    needs_forward_mode = False
    needs_smooth_activations = True
    sharding_safe = True

    def __init__(self, step: float = STEP) -> None:
        self.step = step

    def embed(
        self,
        module: nn.Module,
        logits_fn: LogitsFn,
        images: Tensor,
        target_class: int,
        objective: ObjectiveFn,
    ) -> EmbeddingLoss:
        """Return the embedding loss; see :class:`~gradsigns_lightning.core.engines.base.Engine`."""
        images = images.detach()
        with twice_differentiable_kernels(module, images.device.type):
            gradients = input_gradients(logits_fn, images, target_class)
            value, direction = objective_gradient(objective, gradients)
            # The image with the longest direction sets the step. A satisfied objective has no direction, by
            # whose length nothing must be divided.
            length = direction.flatten(1).norm(dim=1).amax()
            size = images.flatten(1).norm(dim=1).square().mean().sqrt()
            radius = self.step * torch.where(size > 0, size, 1)
            offset = direction * torch.where(length > 0, radius / length, 0)
            both = torch.cat([images + offset, images - offset])
            losses = target_loss(class_logits(logits_fn, both, target_class), target_class, reduction="none")
            ahead, behind = losses.view(2, -1).sum(1)
            slope = (ahead - behind) * length / (2 * radius)
        return with_value(value, slope)
