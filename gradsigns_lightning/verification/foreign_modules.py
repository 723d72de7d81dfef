"""Foreign modules: telling them from oracles, and making them readable or refusing them."""

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
_FLOATS = ("FloatFunctional", "FXFloatFunctional")  # live in `_INT8`'s modules, and add in floating point


def is_module(suspect: Any, *, argument: str) -> TypeGuard[nn.Module]:
    """Tell whether a suspect is a module, whose weights can be read, or an oracle, which only answers.

    Args:
        suspect: the suspect.
        argument: what it is called in the error message.

    Raises:
        TypeError: the suspect is neither.
    """
    if not callable(suspect):
        hint = load_first(suspect)
        raise TypeError(
            f"`{argument}` must be a module or a callable, got {type(suspect).__name__}.{hint and ' '}{hint}"
        )
    return isinstance(suspect, nn.Module)


def load_first(suspect: Any) -> str:
    """Return what to do with a path or a state dict that was passed as a module; empty for anything else."""
    if not isinstance(suspect, (str, PathLike, Mapping)):
        return ""
    return "Load it first, for example with Net.load_from_checkpoint(path), and pass the module."


@contextmanager
def shapes_named(key: SignatureKey, model: nn.Module) -> Iterator[None]:
    """Turn an error of a network that rejects the images into one that names their shape and the key.

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
            f"{tuple(key.input_shape)}, which the images have; it raised: "
            f"{str(error).strip().rstrip('.')[:500]}. Is this the model that the key was made for?"
        ) from error


def refuse_int8(model: nn.Module) -> None:
    """Refuse a quantized network, whose outputs have no gradient.

    Raises:
        ValueError: a module computes in int8; the message names it, and ``verify_api``.
    """
    for name, module in model.named_modules():
        if (
            any(word in where for word in _INT8 for where in _origins(module))
            and type(module).__name__ not in _FLOATS
        ):
            raise ValueError(
                f"`model` computes in int8 (module {name or '(root)'!r}) and has no gradients: read its "
                "answers with `verify_api(model, key, images)`, or the weights of the network that it was "
                "made from."
            )


def _origins(module: nn.Module) -> Iterator[str]:
    yield f"{type(module).__module__}."
    if isinstance(module, torch.jit.ScriptModule):
        yield str(module._c._type().qualified_name())
    if isinstance(module, torch.fx.GraphModule):
        yield from (str(node.target) for node in module.graph.nodes if node.op == "call_function")


@contextmanager
def without_inference_tensors(model: nn.Module) -> Iterator[None]:
    """Replace weights that were created under ``inference_mode``, which autograd refuses, with copies."""
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
    """Return a logits function for any number of images, even if it was exported for one batch size."""
    size = _static_batch_size(model)
    if size is None:
        return logits_fn

    def padded_to_size(inputs: Tensor) -> Tensor:
        n_missing = -len(inputs) % size
        padded = torch.cat([inputs, inputs[-1:].expand(n_missing, *inputs.shape[1:])])
        return torch.cat([as_logits(logits_fn(part)) for part in torch.split(padded, size)])[: len(inputs)]

    return padded_to_size


def _static_batch_size(model: nn.Module) -> int | None:
    graph: Any = model.graph.nodes if isinstance(model, torch.fx.GraphModule) else ()
    values = [node.meta.get("val") for node in graph if node.op == "placeholder"]
    sizes = [value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim > 1]
    # a free batch size is a symbol, not an integer
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], int) else None
