"""Forward mode for the directional derivative, and reverse mode through it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.core.engines.base import EmbeddingLoss, ObjectiveFn, objective_gradient, with_value
from gradsigns_lightning.core.signature import LogitsFn, class_logits, input_gradients, target_loss
from gradsigns_lightning.core.torch_state.contexts import Replaced, twice_differentiable_kernels


class ForwardOverReverse:
    """Takes an ordinary input gradient, then ``torch.func.jvp`` along the objective's derivative.

    The backward pass through the latter yields the exact gradient (Pearlmutter, "Fast exact multiplication by
    the Hessian", 1994). This engine is for models with operations that cannot be differentiated twice in
    reverse mode, and for sharded parameters; it takes about half again as long as double backward.
    """

    name = "forward_over_reverse"
    needs_forward_mode = True
    needs_smooth_activations = False
    sharding_safe = True

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
            RuntimeError: the directional derivative carries no graph, so nothing would be embedded.
        """
        images = images.detach()
        with twice_differentiable_kernels(module, images.device.type):
            gradients = input_gradients(logits_fn, images, target_class)
        value, direction = objective_gradient(objective, gradients)
        return with_value(value, directional_derivative(module, logits_fn, images, target_class, direction))


def directional_derivative(
    module: nn.Module, logits_fn: LogitsFn, images: Tensor, target_class: int, direction: Tensor
) -> Tensor:
    """Return the derivative of the loss, summed over images, along ``direction``; a scalar with a graph.

    Args:
        module: module that owns the parameters, for the choice of kernels.
        logits_fn: maps inputs ``(n, ...)`` to logits ``(n, n_classes)``.
        images: inputs, shape ``(n, ...)``.
        target_class: class T.
        direction: direction in the space of the inputs, same shape.
    """

    def loss(inputs: Tensor) -> Tensor:
        return target_loss(class_logits(logits_fn, inputs, target_class), target_class)

    with twice_differentiable_kernels(module, images.device.type), _reversible_norms():
        slope: Tensor = torch.func.jvp(loss, (images,), (direction,))[1]
    return slope


def _reversible_norms() -> Replaced:
    """Compute layer and instance normalization from elementary operations.

    The backward passes of PyTorch's forward-mode formulas treat the statistics as constants, which is
    silently wrong by several percent.
    """
    return Replaced(
        {F.layer_norm: _layer_norm, torch.layer_norm: _layer_norm, F.instance_norm: _instance_norm}
    )


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    _cudnn_enable: bool = True,
) -> Tensor:
    normalized = _standardized(input, tuple(range(-len(normalized_shape), 0)), eps)
    normalized = normalized if weight is None else normalized * weight
    return normalized if bias is None else normalized + bias


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        # Not F.batch_norm, which is itself replaced in these passes.
        return torch.batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps, False)
    shape = (-1, *[1] * (input.ndim - 2))
    normalized = _standardized(input, tuple(range(2, input.ndim)), eps)
    normalized = normalized if weight is None else normalized * weight.view(shape)
    return normalized if bias is None else normalized + bias.view(shape)


def _standardized(values: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    variance, mean = torch.var_mean(values, dims, correction=0, keepdim=True)
    return (values - mean) * (variance + eps).rsqrt()
