"""Contexts of the embedding and reading passes; each restores what it changed, also on exception."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Run ``module`` with evaluation statistics: no update of running buffers, no dropout, no coupling between samples.

    The flags are set one by one, not by ``eval()``, which user modules override (a frozen backbone, for example). The state of
    the random generators is put back, so that the task's own randomness is what it would be without the pass.
    """
    training = [m for m in module.modules() if m.training]
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        for m in training:
            m.training = False
        try:
            yield
        finally:
            for m in training:
                m.training = True


class Replaced(TorchFunctionMode):
    """Calls other functions in the place of some of PyTorch's.

    Args:
        replacements: from a public function of PyTorch to what is called with its arguments.
    """

    def __init__(self, replacements: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.replacements = replacements

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.replacements.get(func, func)(*args, **(kwargs or {}))


class _BatchNorms:
    """Computes batch normalisation with frozen statistics as what it is then: one factor and one term for each channel.

    PyTorch's second derivative is made for statistics of the batch, and slower.

    Args:
        following: give the running mean, whose value stays, the derivative of the mean over these images of what the linear or
            convolutional layer right before gives. The task's network does not feel a shift of that mean, which the batch's own
            takes out again; a mark made of such shifts spoils the running statistics until they have followed, and is gone then.
    """

    def __init__(self, *, following: bool) -> None:
        self._following = following
        self._last: tuple[Tensor, Tensor] | None = None  # what a linear layer gave, and its mean, shape (C,)

    def replaced(self) -> Replaced:
        """Return the mode that computes so."""
        layers = (F.linear, F.conv1d, F.conv2d, F.conv3d) if self._following else ()
        return Replaced({F.batch_norm: self._batch_norm, **{layer: self._observed(layer) for layer in layers}})

    def _observed(self, layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
            output = layer(input, weight, bias, *args, **kwargs)
            if torch.is_grad_enabled() and weight.requires_grad and input.ndim == weight.ndim:
                # The mean over images of what a linear layer gives is what it gives for the mean image. Not through the input:
                # the images' gradients stay their own. Now, as sharded weights are gone when the normalisation is called.
                mean = layer(input.detach().mean(0, keepdim=True), weight, bias, *args, **kwargs)
                self._last = output, mean.transpose(0, 1).flatten(1).mean(1)
            return output

        return call

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        last, self._last = self._last, None
        if training or running_mean is None or running_var is None:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if last is not None and last[0] is input:
            running_mean = running_mean + (last[1] - last[1].detach())
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
def full_float32() -> Iterator[None]:
    """Compute float32 as such on CUDA, not as TF32, whose ten binary digits can turn the sign of a small projection."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # from torch 2.9 on
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
def twice_differentiable_kernels(module: nn.Module, device_type: str, *, embedding: bool = False) -> Iterator[None]:
    """Choose kernels that have a second derivative, a cheap one, in full precision.

    Fused attention, cuDNN's recurrent kernels and compiled graphs have none; under autocast first-order gradients of float16
    underflow. For ``embedding`` the running means of batch normalisation follow the weights in the derivative
    (:class:`_BatchNorms`); all values are the same.
    """
    with ExitStack() as stack:
        following = embedding and any(isinstance(m, _BatchNorm) for m in module.modules())
        stack.enter_context(_BatchNorms(following=following).replaced())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if device_type == "cuda" and any(isinstance(m, nn.RNNBase) for m in module.modules()):
            # Before the next context: the flags read a setting that torch refuses to tell once operators have their own.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if device_type == "cuda":
            stack.enter_context(full_float32())
        yield
