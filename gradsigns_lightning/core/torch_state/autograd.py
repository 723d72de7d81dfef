"""What PyTorch's autograd lacks: gradients inside modes, suspended hooks, known gradients, graph walks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def derivative(
    value: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a scalar, None for inputs that it does not depend on.

    Unlike :func:`torch.autograd.grad` it stays inside an active
    :class:`~torch.overrides.TorchFunctionMode`, so that checkpointed activations are recomputed by the same
    functions as before.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    start = torch.ones_like(value)
    return tuple(
        engine.run_backward(
            (value,),
            (start,),
            create_graph,
            create_graph,
            tuple(inputs),
            allow_unreachable=True,
            accumulate_grad=False,
        )
    )


@contextmanager
def hooks_set_aside(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Suspend the tensors' own hooks, because another backward pass will call them on the same gradients."""
    hooked: list[tuple[Any, Any]] = [(t, t._backward_hooks) for t in tensors if t._backward_hooks]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks


def with_gradients(value: Tensor, gradients: Mapping[Tensor, Tensor]) -> Tensor:
    """Return a scalar whose ``backward()`` passes on gradients that are known already.

    Args:
        value: value of the scalar.
        gradients: gradient by tensor.
    """
    apply: Any = _Differentiated.apply  # torch's annotations differ from version to version
    result: Tensor = apply(value, list(gradients.values()), *gradients)
    return result


class _Differentiated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> Any:
        return None, None, *(gradient * factors[0].to(gradient.dtype) for gradient in ctx.gradients)


def graph_nodes(value: Tensor) -> Iterator[Any]:
    """Yield the nodes of the autograd graph of ``value``."""
    pending: list[Any] = [value.grad_fn]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        yield node
        seen.add(node)
        pending += [successor for successor, _ in node.next_functions]
