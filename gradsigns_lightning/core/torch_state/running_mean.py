"""The running means of batch normalization as functions of the weights, whose mean output they follow.

Module hooks could not do this. The mean must be that of the very value that is normalized, which only the
value's own graph node identifies, not the order of modules. Networks call `F.conv2d` and `F.batch_norm`
without a module, and compiled ones skip hooks that were added later. Sharded weights may be freed before a
hook after their layer is called. And a hook is state of the user's module, also in its copies and pickles,
whereas a PyTorch mode is gone when the pass is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from gradsigns_lightning.core.torch_state.contexts import Replaced, evaluated_batch_norm

_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_NOTE = "gradsigns_mean"


class RunningMeans:
    """The running means that a training updates.

    In evaluation mode a running mean is a constant. In training it follows the mean, over images and
    positions, of the output of the layer right before the normalization. So a shift of that mean does not
    change the task's loss, because batch normalization subtracts it again. A mark made of such shifts would
    make the running statistics wrong until they have followed, and then be gone. If anything is computed in
    between, or the statistics are in half precision, the running mean stays a constant.

    Args:
        training: the modules in training mode, without batch normalization that the user has frozen.
    """

    def __init__(self, training: Iterable[nn.Module]) -> None:
        norms = [m for m in training if isinstance(m, _BatchNorm) and m.momentum != 0]
        # The tensors are kept, so that their ids are not reused.
        self._means = {id(m.running_mean): m.running_mean for m in norms if m.running_mean is not None}

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Give the running means the derivative of the mean that they follow; their values do not change.

        The context must enclose the backward pass too, in which checkpointed activations are recomputed. It
        acts where normalization is computed inside
        :func:`~gradsigns_lightning.core.torch_state.contexts.twice_differentiable_kernels`, entered within
        this context.
        """
        if not self._means:
            yield
            return
        noting: dict[Any, Callable[..., Tensor]] = {layer: _noting(layer) for layer in _LAYERS}
        with Replaced({evaluated_batch_norm: self._normalize, **noting}):
            yield

    def _normalize(self, input: Tensor, running_mean: Tensor, *others: Any) -> Tensor:
        mean = _noted(input) if id(running_mean) in self._means else None
        if mean is not None:
            running_mean = running_mean + (mean - mean.detach())
        return evaluated_batch_norm(input, running_mean, *others)


def _noting(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the linear function ``layer``, which also notes its output's mean over images and positions."""

    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        output = layer(input, weight, bias, *args, **kwargs)
        batched = input.ndim == weight.ndim > 1 and input.layout is torch.strided
        if batched and torch.is_grad_enabled() and _noted(output) is None:
            # The mean output of a linear layer is its output for the mean image. The input is detached, so
            # that the gradient of one image does not depend on the others.
            mean = layer(input.detach().mean(0, keepdim=True), weight, bias, *args, **kwargs)
            _note(output, mean.transpose(0, 1).flatten(1).mean(1))
        return output

    return call


def _note(tensor: Tensor, mean: Tensor) -> None:
    """Attach a mean to this very value of a tensor.

    The graph node is preferred because it survives when activations are recomputed. In forward mode the
    tensor has none, and the tensor object must serve.
    """
    node: Any = tensor.grad_fn
    if node is not None:
        node.metadata[_NOTE] = mean
    elif not tensor.is_inference():  # an inference tensor has no version
        tensor.__dict__[_NOTE] = tensor._version, mean


def _noted(tensor: Tensor) -> Tensor | None:
    node: Any = tensor.grad_fn
    if node is not None:
        return node.metadata.get(_NOTE)  # type: ignore[no-any-return]
    version, mean = tensor.__dict__.get(_NOTE, (None, None))
    return None if version is None or version != tensor._version else mean
