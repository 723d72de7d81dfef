"""What PyTorch's autograd lacks: gradients within modes, hooks set aside, gradients handed out, a walk through a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def derivative(
    value: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a scalar, None for inputs that it does not depend on; :func:`torch.autograd.grad` within modes.

    That function leaves a :class:`~torch.overrides.TorchFunctionMode` for as long as it runs, so that
    checkpointed activations would be computed again by other functions than before.
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
    """Do not call the tensors' own hooks on their gradients, which another backward pass will meet."""
    hooked: list[tuple[Any, Any]] = [(t, t._backward_hooks) for t in tensors if t._backward_hooks]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks


def with_gradients(value: Tensor, gradients: Mapping[Tensor, Tensor]) -> Tensor:
    """Return a scalar of that value whose ``backward()`` hands out gradients that are known already.

    Args:
        value: the scalar.
        gradients: of each tensor that gets one.
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
    """Yield the nodes of the graph that ``value`` was computed by."""
    pending: list[Any] = [value.grad_fn]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        yield node
        seen.add(node)
        pending += [successor for successor, _ in node.next_functions]
