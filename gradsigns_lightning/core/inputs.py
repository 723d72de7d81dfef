"""The tensor that carries the mark, in full precision: the network's input or a layer's output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsigns_lightning.core.signature import LogitsFn
from gradsigns_lightning.core.torch_state.contexts import twice_differentiable_kernels
from gradsigns_lightning.core.torch_state.precision import in_full_precision


def carrier_inputs(
    module: nn.Module, logits_fn: LogitsFn, inputs: Tensor, input_shape: tuple[int, ...], layer: str | None
) -> tuple[Tensor, LogitsFn]:
    """Return the tensor that carries the mark, and the logits as a function of it.

    Half-precision networks are computed in float32, and their gradients flow back through the conversion:
    second derivatives underflow in float16 and have two digits in bfloat16.

    Args:
        module: module that owns the parameters.
        logits_fn: maps the network's inputs to logits.
        inputs: the network's inputs, shape ``(n, ...)``; token ids where ``layer`` is an embedding.
        input_shape: the key's input shape.
        layer: name of the submodule whose output carries the mark, or None for the input itself.

    Returns:
        Floating-point tensor ``(n, ...)`` with the key's number of inputs per sample, and a function that
        takes such tensors with any multiple of n samples.

    Raises:
        ValueError: ``layer`` is not a submodule, is not called exactly once, or its output has another size.
    """
    logits_fn, dtype = in_full_precision(module, logits_fn)
    if layer is None:
        return inputs.to(dtype), logits_fn
    submodule = find_layer(module, layer)
    seen: list[Tensor] = []
    with ExitStack() as stack:
        # A compiled forward pass would not call the hook, and autocast would round the layer's output.
        stack.enter_context(twice_differentiable_kernels(module, inputs.device.type))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_output_hook(submodule, lambda output: seen.append(output.detach().clone())))
        logits_fn(inputs)
    if (
        len(seen) != 1
        or seen[0].shape[1:].numel() != torch.Size(input_shape).numel()
        or len(seen[0]) != len(inputs)
    ):
        came = [tuple(output.shape) for output in seen]
        raise ValueError(
            f"`carrier_layer` {layer!r} must be called once and return ({len(inputs)}, ...) with as many "
            f"values per sample as the key's `input_shape` {input_shape}, got outputs of shape {came}."
        )

    def logits_of(carriers: Tensor) -> Tensor:
        repeated = inputs.repeat(len(carriers) // len(inputs), *[1] * (inputs.ndim - 1))
        with _output_hook(submodule, lambda output: carriers.view(-1, *seen[0].shape[1:]).to(output.dtype)):
            return logits_fn(repeated)

    return seen[0].to(dtype), logits_of


def find_layer(module: nn.Module, layer: str) -> nn.Module:
    """Return the submodule of that name.

    Raises:
        ValueError: there is none.
    """
    modules: dict[str, nn.Module] = dict(module.named_modules())
    if not layer or layer not in modules:
        embeddings = [name for name, child in modules.items() if isinstance(child, nn.Embedding)]
        raise ValueError(
            f"`carrier_layer` must name a submodule (embeddings here: {embeddings}), got {layer!r}."
        )
    return modules[layer]


@contextmanager
def _output_hook(module: nn.Module, function: Any) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _module, _args, output: function(output))
    try:
        yield
    finally:
        handle.remove()
