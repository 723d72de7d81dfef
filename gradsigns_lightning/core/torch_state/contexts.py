"""Contexts of the embedding and reading passes; each restores what it changed, also on exception."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from gradsigns_lightning.core.torch_state.snapshot import side_effects_undone

# Ids of the running means that the task's training updates; batch normalisation that the user has frozen is not among them.
_TRAINED: ContextVar[frozenset[int]] = ContextVar("trained", default=frozenset())


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Run ``module`` with evaluation statistics: no update of running buffers, no dropout, no coupling between samples.

    The flags are set one by one, not by ``eval()``, which user modules override (a frozen backbone, for example). All that the
    passes change beside, the random generators too, is put back, so that the task goes on as it would without them.
    """
    # A frozen TorchScript module has no flag.
    training = [m for m in module.modules() if getattr(m, "training", False)]
    norms = [m for m in training if isinstance(m, _BatchNorm) and m.momentum != 0]
    with side_effects_undone(module):
        trained = _TRAINED.set(_TRAINED.get() | {id(m.running_mean) for m in norms})
        for m in training:
            m.training = False
        try:
            yield
        finally:
            _TRAINED.reset(trained)
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


def derivative(value: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False) -> tuple[Tensor | None, ...]:
    """Return the gradients of a scalar, None for inputs that it does not depend on; :func:`torch.autograd.grad` within modes.

    That function leaves a :class:`Replaced` for as long as it runs, so that checkpointed activations would be computed again by
    other functions than before.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    start = torch.ones_like(value)
    return tuple(
        engine.run_backward(
            (value,), (start,), create_graph, create_graph, tuple(inputs), allow_unreachable=True, accumulate_grad=False
        )
    )


def _batch_norm(
    trained: frozenset[int],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute batch normalisation with frozen statistics as what it is then: one factor and one term for each channel.

    PyTorch's second derivative is made for statistics of the batch, and slower. A running mean in ``trained`` has the derivative
    of the mean that :func:`_with_mean` noted with the input.
    """
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    noted = _noted(input) if id(running_mean) in trained else None
    if noted is not None:
        running_mean = running_mean + (noted - noted.detach())
    factor = (running_var + eps).rsqrt()
    factor = factor if weight is None else factor * weight
    term = -running_mean * factor
    term = term if bias is None else term + bias
    shape = (-1, *[1] * (input.ndim - 2))
    return input * factor.view(shape) + term.view(shape)


def _with_mean(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the linear function ``layer``, which notes with its output the mean over images and places, shape ``(C,)``.

    The task's network does not feel a shift of that mean, which batch normalisation takes out again. A mark made of such shifts
    would spoil the running statistics until they have followed, and be gone then. If anything is computed in between, or the
    statistics are in half precision, the running mean is a constant.
    """

    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        output = layer(input, weight, bias, *args, **kwargs)
        batched = input.ndim == weight.ndim > 1 and input.layout is torch.strided
        if batched and torch.is_grad_enabled() and _noted(output) is None:
            # The mean of what a linear layer gives is what it gives for the mean image. Not through the input: each image's
            # gradient stays its own. Here, not in the normalisation, before which sharded weights are gone.
            mean = layer(input.detach().mean(0, keepdim=True), weight, bias, *args, **kwargs)
            _note(output, mean.transpose(0, 1).flatten(1).mean(1))
        return output

    return call


_NOTE = "gradsigns_mean"


def _note(tensor: Tensor, mean: Tensor) -> None:
    """Note a mean with this very value of a tensor.

    The node that computed it lasts when activations are computed again; in forward mode it does not show, and the object has to
    do.
    """
    node: Any = tensor.grad_fn
    if node is not None:
        node.metadata[_NOTE] = mean
    elif not tensor.is_inference():  # such a one has no version
        tensor.__dict__[_NOTE] = tensor._version, mean


def _noted(tensor: Tensor) -> Tensor | None:
    node: Any = tensor.grad_fn
    if node is not None:
        return node.metadata.get(_NOTE)  # type: ignore[no-any-return]
    version, mean = tensor.__dict__.get(_NOTE, (None, None))
    return None if version is None or version != tensor._version else mean


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
def twice_differentiable_kernels(module: nn.Module, device_type: str) -> Iterator[None]:
    """Choose kernels that have a second derivative, a cheap one, in full precision.

    Fused attention, cuDNN's recurrent kernels and compiled graphs have none; under autocast first-order gradients of float16
    underflow. Within :func:`frozen_statistics` the running means of batch normalisation, whose values stay, have the derivative
    of the mean that the layer right before gives the images.
    """
    with ExitStack() as stack:
        trained = _TRAINED.get()
        layers = (F.linear, F.conv1d, F.conv2d, F.conv3d) if trained else ()
        noting: dict[Any, Callable[..., Tensor]] = {layer: _with_mean(layer) for layer in layers}
        stack.enter_context(Replaced({F.batch_norm: partial(_batch_norm, trained), **noting}))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if device_type == "cuda" and any(isinstance(m, nn.RNNBase) for m in module.modules()):
            # Before the next context: the flags read a setting that torch refuses to tell once operators have their own.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if device_type == "cuda":
            stack.enter_context(full_float32())
        yield
