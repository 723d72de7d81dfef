"""Forward mode for the directional derivative, reverse mode through it: no second derivative in reverse mode is needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradsigns_lightning.core.engines.base import EmbeddingLoss, ObjectiveFn, objective_gradient, with_value
from gradsigns_lightning.core.frozen import twice_differentiable_kernels
from gradsigns_lightning.core.signature import LogitsFn, class_logits, input_gradients, target_loss


class ForwardOverReverse:
    """One ordinary input gradient, then ``torch.func.jvp`` along the objective's derivative and one backward pass through it.

    Exact (Pearlmutter, "Fast exact multiplication by the Hessian", 1994). For models with operations that cannot be
    differentiated twice in reverse mode; about half again as slow as double backward.
    """

    name = "forward_over_reverse"
    needs_double_backward = False
    needs_forward_mode = True
    needs_smooth_activations = False
    sharding_safe = False

    def embed(
        self, module: nn.Module, logits_fn: LogitsFn, images: Tensor, target_class: int, objective: ObjectiveFn
    ) -> EmbeddingLoss:
        """Return the embedding loss; see :class:`~gradsigns_lightning.core.engines.base.Engine`.

        Raises:
            RuntimeError: the directional derivative came without a graph, so nothing would be embedded.
        """
        with twice_differentiable_kernels(module, images.device.type):
            gradients = input_gradients(logits_fn, images, target_class)
            value, direction = objective_gradient(objective, gradients)
            _, slope = torch.func.jvp(  # type: ignore[misc]  # three values only with has_aux
                lambda x: target_loss(class_logits(logits_fn, x, target_class), target_class), (images.detach(),), (direction,)
            )
        return with_value(value, slope)
