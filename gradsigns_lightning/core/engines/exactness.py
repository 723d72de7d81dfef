"""Checks an engine's gradient against finite differences, for networks with custom autograd functions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from gradsigns_lightning.core.engines.base import Engine, ObjectiveFn
from gradsigns_lightning.core.signature import LogitsFn, class_logits, input_gradients, target_loss
from gradsigns_lightning.core.torch_state.autograd import derivative, graph_nodes
from gradsigns_lightning.core.torch_state.precision import Call, default_dtype

_N_DIRECTIONS = 3
# The step by dtype, relative to the parameters. In float64 it is so small that it crosses no kink. In
# float32, for functions that support nothing else, it may, and then there is no result.
_STEPS = {torch.float64: 1e-7, torch.float32: 1e-2}
_COMPUTE_NOTHING = ("torch.distributed.", "torch.utils.checkpoint")  # functions of sharding and checkpointing
_EXACT = 0.01  # largest relative error of an exact engine
_SMOOTH = 0.05  # largest relative difference between two step sizes without a kink


def inexact(
    engine: Engine,
    module: nn.Module,
    logits_fn: LogitsFn,
    images: Tensor,
    target_class: int,
    objective: ObjectiveFn,
) -> str | None:
    """Return which custom autograd functions make the engine's gradient wrong, in words, or None.

    A function's backward pass may be right, and pass PyTorch's checks, but have a wrong derivative itself:
    what the forward pass stored on ``ctx`` (``ctx.slope = ...``) is differentiated as a constant.

    Args:
        engine: the engine.
        module: module whose statistics are frozen already.
        logits_fn: maps inputs ``(n, ...)`` to logits.
        images: a few inputs.
        target_class: class T.
        objective: linear map from the input gradients to a scalar.
    """
    names = sorted(set(_custom_functions(logits_fn, images, target_class)))
    if not names:
        return None
    for dtype in _STEPS:
        try:
            deviation = _deviation(engine, module, logits_fn, images, target_class, objective, dtype)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a custom kernel may support one dtype only
            continue
        if deviation is None or deviation <= (_SMOOTH if engine.needs_smooth_activations else _EXACT):
            return None
        return (
            f"a custom autograd function ({', '.join(names)}) has no exact second derivative (off by "
            f"{deviation:.0%}): let its backward pass compute from `ctx.saved_tensors` what its forward pass "
            "now keeps on `ctx`"
        )
    return None


def _custom_functions(logits_fn: LogitsFn, images: Tensor, target_class: int) -> Iterator[str]:
    logits = class_logits(logits_fn, images.detach().requires_grad_(), target_class)
    for node in graph_nodes(logits):
        forward: Any = getattr(node, "_forward_cls", type(node))
        if isinstance(node, BackwardCFunction) and not forward.__module__.startswith(_COMPUTE_NOTHING):
            yield type(node).__name__.removesuffix("Backward")


def warn_of_unchecked(logits_fn: LogitsFn, images: Tensor, target_class: int) -> None:
    """Warn of custom autograd functions, which cannot be checked when parameters are sharded."""
    names = sorted(set(_custom_functions(logits_fn, images, target_class)))
    if names:
        warnings.warn(
            "With sharded parameters it cannot be checked whether custom autograd functions "
            f"({', '.join(names)}) have an exact second derivative. If they have none, the mark is embedded "
            "by a wrong gradient: fit a few steps on a single device first, where it is checked.",
            UserWarning,
            stacklevel=2,
        )


class _Network:
    """A network as a function of its parameters, in another precision.

    Args:
        module: module that owns the parameters.
        logits_fn: maps inputs to logits.
        dtype: dtype of parameters and buffers.
    """

    def __init__(self, module: nn.Module, logits_fn: LogitsFn, dtype: torch.dtype) -> None:
        self._call = Call(module, logits_fn)
        self._buffers = {name: _cast(b, dtype) for name, b in module.named_buffers()}
        self.values = {
            name: _cast(p.detach(), dtype).requires_grad_(p.requires_grad)
            for name, p in module.named_parameters()
        }
        self.trained = [name for name, p in self.values.items() if p.requires_grad]
        self.dtype = dtype

    def logits_fn(self, shift: dict[str, Tensor], step: float = 0.0) -> LogitsFn:
        """Return the logits function with the parameters moved by ``step`` times ``shift``."""
        values = {
            name: value.detach() + step * shift[name] if step and name in shift else value
            for name, value in self.values.items()
        }
        tensors = {f"module.{name}": tensor for name, tensor in {**self._buffers, **values}.items()}

        def call(inputs: Tensor) -> Tensor:
            with default_dtype(self.dtype):
                return torch.func.functional_call(self._call, tensors, (inputs,))  # type: ignore[no-any-return]

        return call

    def directions(self) -> list[dict[str, Tensor]]:
        """Return random shifts of the trained parameters, each as long as its parameter."""
        generator = torch.Generator().manual_seed(0)

        def like(value: Tensor) -> Tensor:
            size = value.detach().square().mean().sqrt().clamp_min(0.01)
            return torch.randn(value.shape, generator=generator, dtype=self.dtype).to(value.device) * size

        return [{name: like(self.values[name]) for name in self.trained} for _ in range(_N_DIRECTIONS)]

    def along(self, value: Tensor, directions: list[dict[str, Tensor]]) -> Tensor:
        """Return the derivatives of ``value`` along the directions, by autograd."""
        gradients = derivative(value, [self.values[name] for name in self.trained])
        known = {name: g for name, g in zip(self.trained, gradients, strict=True) if g is not None}
        return torch.stack(
            [torch.stack([(g * d[name]).sum() for name, g in known.items()]).sum() for d in directions]
        )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _deviation(
    engine: Engine,
    module: nn.Module,
    logits_fn: LogitsFn,
    images: Tensor,
    target_class: int,
    objective: ObjectiveFn,
    dtype: torch.dtype,
) -> float | None:
    """Return the relative error of the engine's derivatives; None if finite differences cannot tell."""
    network, images, step = _Network(module, logits_fn, dtype), _cast(images, dtype), _STEPS[dtype]
    directions = network.directions()

    def loss(logits_of: LogitsFn) -> Tensor:
        return target_loss(class_logits(logits_of, images, target_class), target_class)

    def embedded(logits_of: LogitsFn) -> Tensor:
        return objective(input_gradients(logits_of, images, target_class))

    def differences(function: Callable[[LogitsFn], Tensor], size: float) -> Tensor:
        ends = [
            [function(network.logits_fn(d, sign * size)).detach() for sign in (1, -1)] for d in directions
        ]
        return torch.stack([(ahead - behind) / (2 * size) for ahead, behind in ends])

    unmoved = network.logits_fn({})
    if _relative(network.along(loss(unmoved), directions), differences(loss, step)) > _SMOOTH:
        return None  # the first derivative is wrong as well, on purpose: as that of a rounding function
    whole, half = (differences(embedded, size) for size in (step, step / 2))
    if _relative(whole, half) > _SMOOTH:
        return None
    surrogate = engine.embed(module, unmoved, images, target_class, objective).surrogate
    return _relative(network.along(surrogate, directions), half)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
