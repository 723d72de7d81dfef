"""Contexts of the embedding and reading passes; each restores what it changed, also on exception."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from gradsigns_lightning.core.torch_state.precision import full_float32
from gradsigns_lightning.core.torch_state.snapshot import side_effects_undone


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Run ``module`` with evaluation statistics: no running updates, no dropout, no coupling of samples.

    The flags are set one by one, not by ``eval()``, which user modules may override (a frozen backbone, for
    example). Everything else that the passes change, including the random generators, is restored, so that
    the task goes on as it would without them.

    Yields:
        The modules that were in training mode, and will be again.
    """
    # A frozen TorchScript module has no flag.
    training = [m for m in module.modules() if getattr(m, "training", False)]
    with side_effects_undone(module):
        for m in training:
            m.training = False
        try:
            yield training
        finally:
            for m in training:
                m.training = True


class Replaced(TorchFunctionMode):
    """Calls other functions in place of some of PyTorch's.

    Args:
        replacements: maps public functions of PyTorch to what is called with their arguments.
    """

    def __init__(self, replacements: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.replacements = replacements

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.replacements.get(func, func)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return evaluated_batch_norm(input, running_mean, running_var, weight, bias, eps)


def evaluated_batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Compute batch normalization with running statistics, as one factor and one term per channel.

    PyTorch's second derivative is made for batch statistics, and slower. Like PyTorch's own functions, this
    one can be replaced by an outer mode.
    """
    if has_torch_function((input,)):
        arguments = (input, running_mean, running_var, weight, bias, eps)
        replaced: Tensor = handle_torch_function(evaluated_batch_norm, (input,), *arguments)
        return replaced
    factor = (running_var + eps).rsqrt()
    factor = factor if weight is None else factor * weight
    term = -running_mean * factor
    term = term if bias is None else term + bias
    shape = (-1, *[1] * (input.ndim - 2))
    return input * factor.view(shape) + term.view(shape)


@contextmanager
def gradients_enabled() -> Iterator[None]:
    """Allow gradients inside ``no_grad`` and ``inference_mode`` (Lightning's validation and test loops)."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def twice_differentiable_kernels(module: nn.Module, device_type: str) -> Iterator[None]:
    """Choose kernels in full precision that have a second derivative, and a cheap one.

    Fused attention, cuDNN's recurrent kernels and compiled graphs have none. Under autocast, gradients
    underflow in float16.
    """
    with ExitStack() as stack:
        stack.enter_context(Replaced({F.batch_norm: _batch_norm}))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if device_type == "cuda" and any(isinstance(m, nn.RNNBase) for m in module.modules()):
            # Before the next context, because these flags read a setting that torch refuses to return once
            # the operators have settings of their own.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if device_type == "cuda":
            stack.enter_context(full_float32())
        yield
