"""The engine protocol: how the embedding objective's gradient reaches the parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from gradsigns_lightning.core.distributed import average
from gradsigns_lightning.core.dose import total_length
from gradsigns_lightning.core.signature import LogitsFn
from gradsigns_lightning.core.torch_state.autograd import derivative, hooks_set_aside, with_gradients
from gradsigns_lightning.core.torch_state.contexts import twice_differentiable_kernels
from gradsigns_lightning.core.torch_state.running_mean import RunningMeans

ObjectiveFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EmbeddingLoss:
    """The result of an engine.

    Attributes:
        value: the objective's value, detached scalar.
        surrogate: scalar of that value whose ``backward()`` adds the objective's gradient to the parameters'.
    """

    value: Tensor
    surrogate: Tensor


class Engine(Protocol):
    """Differentiates an objective of the input gradient with respect to the parameters.

    Attributes:
        name: name for ``engine=``.
        needs_forward_mode: every operation, and its backward pass, must have a forward-mode derivative.
        needs_smooth_activations: the result is wrong on kinked activations such as ReLU.
        sharding_safe: the result is right when parameters are sharded (FSDP).
    """

    name: str
    needs_forward_mode: bool
    needs_smooth_activations: bool
    sharding_safe: bool

    def embed(
        self,
        module: nn.Module,
        logits_fn: LogitsFn,
        images: Tensor,
        target_class: int,
        objective: ObjectiveFn,
    ) -> EmbeddingLoss:
        """Return the embedding loss.

        Args:
            module: module that owns the parameters, for the choice of kernels; the caller sets its training
                flags.
            logits_fn: maps inputs ``(n, ...)`` to logits ``(n, n_classes)``.
            images: inputs as the network takes them, shape ``(n, ...)``.
            target_class: class T.
            objective: maps the gradients of all images, shape ``(n, ...)``, to a scalar; called once.
        """
        ...


def objective_gradient(objective: ObjectiveFn, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Return the objective's value and its derivative v with respect to the input gradients, both detached.

    The gradient that is wanted, dR/dtheta, is the derivative with respect to theta of the directional
    derivative of the loss along v, with v held fixed (chain rule).
    """
    leaf = gradients.detach().requires_grad_()
    value = objective(leaf)
    (direction,) = torch.autograd.grad(value, leaf)
    return value.detach(), direction


def with_value(value: Tensor, slope: Tensor) -> EmbeddingLoss:
    """Return an embedding loss with this value and the gradient of ``slope``.

    Raises:
        RuntimeError: ``slope`` carries no graph, so nothing would be embedded.
    """
    check_graph(slope)
    return EmbeddingLoss(value=value, surrogate=slope + (value - slope).detach())


def differentiated(
    loss: Tensor, module: nn.Module, *, length: Tensor, world_size: int = 1, means: RunningMeans | None = None
) -> Tensor:
    """Return ``loss`` scaled so that its gradients have a given length, already differentiated.

    Its ``backward()`` passes on gradients that are computed here. So the activations of task and mark are not
    in memory at the same time, and the gradients are computed in full precision, with the kernels and the
    frozen statistics of the embedding pass. If one of them is non-finite (such as the second derivative of a
    norm at zero), all are zero and the value is NaN: the step embeds nothing and does no harm.

    Args:
        loss: scalar to differentiate.
        module: module with respect to whose parameters it is differentiated.
        length: Euclidean length of all gradients together, scalar.
        world_size: number of data-parallel ranks, over which the gradients are averaged.
        means: running means that were followed in the forward pass, for activations that are recomputed.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    # The parameters' own hooks are left to the task's backward pass, which receives these gradients.
    followed = nullcontext() if means is None else means.followed()
    with followed, twice_differentiable_kernels(module, loss.device.type), hooks_set_aside(parameters):
        gradients = derivative(loss, parameters)
    reached = {p: g for p, g in zip(parameters, gradients, strict=True) if g is not None}
    dense = [g for g in reached.values() if g.layout is torch.strided]
    average(dense, world_size=world_size)
    own = total_length(dense)
    own = loss.detach().float().abs() if own is None else own
    finite = loss.detach().isfinite() & own.isfinite()
    factor = torch.where(finite & (own > 0), length.to(own) / torch.where(own > 0, own, 1), 0)
    usable = [torch.where(finite, g, 0) if g.layout is torch.strided else g for g in reached.values()]
    kept = [g * factor.to(g.dtype) for g in usable]
    value = torch.where(finite, loss.detach() * factor.to(loss.dtype), torch.nan)
    return with_gradients(value, dict(zip(reached, kept, strict=True)))


def check_graph(value: Tensor) -> None:
    """Refuse a value without a graph, which some versions of ``torch.compile`` drop silently."""
    if not value.requires_grad:
        raise RuntimeError(
            "The input gradient carries no graph, so the watermark cannot be embedded in this model."
        )
