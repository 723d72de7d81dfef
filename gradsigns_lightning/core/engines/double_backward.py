"""The reference engine: reverse mode over reverse mode."""

from __future__ import annotations

from torch import Tensor, nn

from gradsigns_lightning.core.engines.base import EmbeddingLoss, ObjectiveFn, check_graph
from gradsigns_lightning.core.signature import LogitsFn, input_gradients
from gradsigns_lightning.core.torch_state.contexts import twice_differentiable_kernels


class DoubleBackward:
    """Computes the input gradient with ``create_graph=True``, and differentiates it a second time.

    It is exact for every model whose operations have a second derivative.
    """

    name = "double_backward"
    needs_forward_mode = False
    needs_smooth_activations = False
    sharding_safe = False

    def embed(
        self,
        module: nn.Module,
        logits_fn: LogitsFn,
        images: Tensor,
        target_class: int,
        objective: ObjectiveFn,
    ) -> EmbeddingLoss:
        """Return the embedding loss; see :class:`~gradsigns_lightning.core.engines.base.Engine`.

        Raises:
            RuntimeError: the input gradient carries no graph, so nothing would be embedded.
        """
        with twice_differentiable_kernels(module, images.device.type):
            gradients = input_gradients(logits_fn, images, target_class, create_graph=True)
            check_graph(gradients)
            loss = objective(gradients)
        return EmbeddingLoss(value=loss.detach(), surrogate=loss)
