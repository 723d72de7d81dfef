"""The running means of batch normalization as functions of the weights, whose mean output they follow.

Why not module hooks: the mean is that of the very value which is normalized, and only that value's own node
of the graph tells so, not the order of modules. Networks call `F.conv2d` and `F.batch_norm` without a module,
and compiled ones skip hooks that came later. Sharded weights may be gone by the time that a hook behind their
layer is called. And a hook is state of the user's module, in its copies and pickles too, where a mode of
PyTorch's is gone when the pass is over.
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

    In evaluation mode a running mean is a constant. The training makes it follow the mean over images and
    places that the layer right before the normalization gives, so the task does not feel a shift of that
    mean, which batch normalization takes out again. A mark made of such shifts would spoil the running
    statistics until they have followed, and be gone then. If anything is computed in between, or the
    statistics are in half precision, the running mean stays a constant.

    Args:
        training: the modules in training mode; batch normalization that the user has frozen is not among
            them.
    """

    def __init__(self, training: Iterable[nn.Module]) -> None:
        norms = [m for m in training if isinstance(m, _BatchNorm) and m.momentum != 0]
        # The tensors, so that their ids stay theirs.
        self._means = {id(m.running_mean): m.running_mean for m in norms if m.running_mean is not None}

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Give the running means the derivative of the mean that they follow; their values stay.

        Around the backward pass too, in which checkpointed activations are computed again. Normalization is
        replaced where it is computed by
        :func:`~gradsigns_lightning.core.torch_state.contexts.twice_differentiable_kernels`, within this
        context.
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
    """Return the linear function ``layer``, which notes with its output the mean over images and places, shape ``(C,)``."""

    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        output = layer(input, weight, bias, *args, **kwargs)
        batched = input.ndim == weight.ndim > 1 and input.layout is torch.strided
        if batched and torch.is_grad_enabled() and _noted(output) is None:
            # The mean of what a linear layer gives is what it gives for the mean image. Not through the
            # input: each image's gradient stays its own.
            mean = layer(input.detach().mean(0, keepdim=True), weight, bias, *args, **kwargs)
            _note(output, mean.transpose(0, 1).flatten(1).mean(1))
        return output

    return call


def _note(tensor: Tensor, mean: Tensor) -> None:
    """Note a mean with this very value of a tensor.

    The node that computed it lasts when activations are computed again; in forward mode it does not show, and
    the object has to do.
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
