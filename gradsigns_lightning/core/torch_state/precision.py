"""The precision of a pass: full float32, also for half-precision networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)
_WITHOUT_FLOAT64 = ("mps",)
NetworkFn = Callable[[Tensor], Tensor]


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device that has none (Apple's GPUs)."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute full float32, not TF32, on CUDA: a 10-bit mantissa can flip the sign of a small projection."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # since torch 2.9
        name, value = "fp32_precision", "ieee"
        cudnn: Any = torch.backends.cudnn
        places: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    else:
        name, value = "allow_tf32", False  # type: ignore[assignment]
        places = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, value)
        yield
    finally:
        for place, previous in zip(places, before, strict=True):
            setattr(place, name, previous)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` the default of new tensors."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


class Call(nn.Module):
    """Wraps a function that uses a module, so that the module's parameters can be replaced for one call.

    Args:
        module: module that owns the parameters; a submodule named ``module``.
        function: function that is called.
    """

    def __init__(self, module: nn.Module, function: NetworkFn) -> None:
        super().__init__()
        self.module = module
        # In a tuple, so that it is not registered as a second submodule, whose shared parameters would not be
        # restored.
        self.function = (function,)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the function's result."""
        return self.function[0](inputs)


def in_full_precision(module: nn.Module, function: NetworkFn) -> tuple[NetworkFn, torch.dtype]:
    """Return a network's function, in float32 if it has half-precision tensors, and the dtype of its inputs.

    The parameters' gradients flow back through the conversion.

    Args:
        module: module that owns the parameters.
        function: maps the network's inputs to its outputs.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if all(tensor.dtype not in HALF for _, tensor in tensors):
        return function, next((t.dtype for _, t in tensors if t.is_floating_point()), torch.float32)
    call = Call(module, function)

    def full(inputs: Tensor) -> Tensor:
        # Looked up in each call, because they may have been replaced by tensors of another precision.
        tensors = [*module.named_parameters(), *module.named_buffers()]
        wide = {f"module.{name}": t.float() for name, t in tensors if t.dtype in HALF}
        with default_dtype(torch.float32 if wide else torch.get_default_dtype()):
            return torch.func.functional_call(call, wide, (inputs,))  # type: ignore[no-any-return]

    return full, torch.float32
