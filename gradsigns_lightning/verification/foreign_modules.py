"""Suspects that readers know nothing of: which kind they are, and modules made readable or refused in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from gradsigns_lightning.core.key.signature_key import SignatureKey
from gradsigns_lightning.core.signature import LogitsFn, as_logits

_INT8 = ("nn.quantized.", "nn.intrinsic.quantized.", "nn.quantized_", "quantized_decomposed")
_FLOATS = ("FloatFunctional", "FXFloatFunctional")  # live there, and add in floating point


def is_module(suspect: Any, *, argument: str) -> TypeGuard[nn.Module]:
    """Tell whether a suspect is a module, whose weights can be read, and not something that answers only.

    Args:
        suspect: the suspect.
        argument: what it is called in the error message.

    Raises:
        TypeError: it is neither.
    """
    if not callable(suspect):
        hint = load_first(suspect)
        raise TypeError(
            f"`{argument}` must be a module or a callable, got {type(suspect).__name__}.{hint and ' '}{hint}"
        )
    return isinstance(suspect, nn.Module)


def load_first(suspect: Any) -> str:
    """Return what to do with a path or a state dict that was given for a module; empty of anything else."""
    if not isinstance(suspect, (str, PathLike, Mapping)):
        return ""
    return "Load it first, as by Net.load_from_checkpoint(path), and give the module."


@contextmanager
def shapes_named(key: SignatureKey, model: nn.Module) -> Iterator[None]:
    """Let the error of a network that does not take the images say which shape they have, and whose it is.

    Raises:
        ValueError: the network raised an error of its own.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"`model` ({type(model).__name__}) must take images of the key's `input_shape` "
            f"{tuple(key.input_shape)}, which the "
            f"images have; it raised: {str(error).strip().rstrip('.')[:500]}. Is this the model that the key "
            f"was made for?"
        ) from error


def refuse_int8(model: nn.Module) -> None:
    """Refuse a network that computes in whole numbers, whose answers have no gradient.

    Raises:
        ValueError: names a module that does, and ``verify_api``.
    """
    for name, module in model.named_modules():
        if (
            any(word in where for word in _INT8 for where in _origins(module))
            and type(module).__name__ not in _FLOATS
        ):
            raise ValueError(
                f"`model` computes in int8 (module {name or '(root)'!r}) and has no gradients: read its "
                f"answers by "
                "`verify_api(model, key, images)`, or the weights of the network that it was made from."
            )


def _origins(module: nn.Module) -> Iterator[str]:
    yield f"{type(module).__module__}."
    if isinstance(module, torch.jit.ScriptModule):
        yield str(module._c._type().qualified_name())
    if isinstance(module, torch.fx.GraphModule):
        yield from (str(node.target) for node in module.graph.nodes if node.op == "call_function")


@contextmanager
def without_inference_tensors(model: nn.Module) -> Iterator[None]:
    """Replace weights that were made under ``inference_mode``, which autograd refuses, by copies."""
    replaced: list[tuple[nn.Module, str, Tensor]] = []
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        tensors = {**module._parameters, **module._buffers, **vars(module)}
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and tensor.is_inference():
                replaced.append((module, name, tensor))
                copies.setdefault(id(tensor), _normal(tensor))
    try:
        for module, name, tensor in replaced:
            setattr(module, name, copies[id(tensor)])
        yield
    finally:
        for module, name, tensor in replaced:
            setattr(module, name, tensor)


def _normal(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        copy = tensor.clone()
    return (
        nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    )


def any_batch_size(model: nn.Module, logits_fn: LogitsFn) -> LogitsFn:
    """Return the logits function for any number of images, also if the network was exported for batches of one size."""
    size = _static_batch_size(model)
    if size is None:
        return logits_fn

    def of_any(inputs: Tensor) -> Tensor:
        n_missing = -len(inputs) % size
        padded = torch.cat([inputs, inputs[-1:].expand(n_missing, *inputs.shape[1:])])
        return torch.cat([as_logits(logits_fn(part)) for part in torch.split(padded, size)])[: len(inputs)]

    return of_any


def _static_batch_size(model: nn.Module) -> int | None:
    graph: Any = model.graph.nodes if isinstance(model, torch.fx.GraphModule) else ()
    values = [node.meta.get("val") for node in graph if node.op == "placeholder"]
    sizes = [value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim > 1]
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], int) else None  # a symbol where it is free
