"""Tries the logits hook; an error ends with an override that helps, tried on the same model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsigns_lightning.core.engines.checking import N_IMAGES
from gradsigns_lightning.core.inputs import carrier_inputs
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.signature import LogitsFn, as_logits, class_logits
from gradsigns_lightning.core.torch_state.contexts import (
    frozen_statistics,
    gradients_enabled,
    twice_differentiable_kernels,
)

Candidate = tuple[str, Callable[[Tensor], Any]]
_PAD = "torch.nn.functional.pad({}, (1, 0))"  # makes the logit of class 0 zero


def check_logits_hook(
    module: nn.Module,
    logits_fn: LogitsFn,
    images: Tensor,
    batch: Any,
    key: WatermarkKey,
    *,
    carrier_layer: str | None,
    sharded: bool,
) -> None:
    """Call the logits hook on a few images.

    Args:
        module: the LightningModule.
        logits_fn: the hook, bound to it.
        images: inputs of the batch, shape ``(n, ...)``.
        batch: the batch as the module gets it.
        key: the owner's key.
        carrier_layer: as in the callback; with it, inputs of any form are passed on as they are.
        sharded: whether parameters are sharded over the ranks; if so, it is not checked that the logits
            depend on the images.

    Raises:
        ValueError: the hook fails, or what it returns is not logits or does not depend on the images; the
            message ends with an override of ``GradSigns.logits``.
    """
    with torch.no_grad(), frozen_statistics(module), twice_differentiable_kernels(module, images.device.type):
        few = images[:N_IMAGES]
        inputs, whole_fn = (few, logits_fn)
        if carrier_layer is None:
            inputs, whole_fn = carrier_inputs(module, logits_fn, few, key.input_shape, None)
        output: Any = None
        try:
            output = as_logits(whole_fn(inputs))
            class_logits(lambda _: output, inputs, key.target_class)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if _is_logits(output, len(inputs), 0):
                raise  # they are logits, of too few classes for the key
            cure = _working([*_parts_of(output), *_calls(module, batch, images)], inputs, key.target_class)
            raise ValueError(_explain(error, output, cure)) from error
        if carrier_layer is None and not sharded and not _is_function_of(whole_fn, inputs):
            others = [
                (code, call) for code, call in _calls(module, batch, images) if _is_function_of(call, inputs)
            ]
            problem = ValueError(
                "`logits` must depend on the images through differentiable operations; those of "
                "`GradSigns.logits` have no gradient (a forward pass under `no_grad`, or through `detach`, "
                "NumPy or integers?)."
            )
            raise ValueError(_explain(problem, output, _working(others, inputs, key.target_class)))


def _explain(error: Exception, output: Any, cure: str | None) -> str:
    first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
    what = (
        first_line
        if output is not None
        else f"`GradSigns.logits` failed on images of the batch: {type(error).__name__}: {first_line}"
    )
    return (
        f"{what}\n"
        "Override `GradSigns.logits` in a subclass, and use that as the "
        f"callback{'; this works here' if cure else ', for example'}:\n"
        "    def logits(self, pl_module, images): return "
        f"{cure or 'pl_module.net(images)  # which returns (n, n_classes)'}"
    )


def _working(candidates: list[Candidate], inputs: Tensor, target_class: int) -> str | None:
    """Return the code of the first candidate that returns logits; None if none does."""
    for code, call in candidates:
        try:
            output = as_logits(call(inputs))
        except Exception:  # noqa: S112 - this one does not
            continue
        if _is_logits(output, len(inputs), target_class):
            return code
    return None


def _is_logits(output: Any, n: int, target_class: int) -> bool:
    return (
        isinstance(output, Tensor)
        and output.ndim == 2
        and output.shape[0] == n
        and output.shape[1] > max(target_class, 1)
        and output.is_floating_point()
    )


def _is_function_of(call: Callable[[Tensor], Any], inputs: Tensor) -> bool:
    """Return whether the logits have a gradient with respect to the inputs; True if only engines can tell."""
    with gradients_enabled():
        leaf = inputs.detach().clone().requires_grad_(True)
        try:
            output = as_logits(call(leaf.clone()))
            return (
                output.requires_grad
                and torch.autograd.grad(output.sum(), leaf, allow_unused=True)[0] is not None
            )
        except Exception:
            return True


def _parts_of(output: Any) -> Iterator[Candidate]:
    """Yield ways to get logits from what the module returned for the images."""
    call = "pl_module(images)"
    if isinstance(output, Mapping):
        yield from ((f"{call}[{name!r}]", lambda _, value=value: value) for name, value in output.items())
    elif isinstance(output, (tuple, list)):
        yield from ((f"{call}[{i}]", lambda _, value=value: value) for i, value in enumerate(output))
    elif isinstance(output, Tensor) and output.ndim == 1:
        yield _PAD.format(f"{call}[:, None]"), lambda _: nn.functional.pad(output[:, None], (1, 0))
    elif isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] == 1:
        yield _PAD.format(call), lambda _: nn.functional.pad(output, (1, 0))
    elif isinstance(output, Tensor) and output.ndim > 2:
        yield f"{call}.flatten(1)", lambda _: output.flatten(1)


def _named_calls(module: Any, name: Any, others: list[Any]) -> Iterator[Candidate]:
    nothing = dict.fromkeys(others)
    yield f"pl_module({{{name!r}: images}})", lambda x: module({name: x})
    yield f"pl_module({name}=images)", lambda x: module(**{name: x})
    yield f"pl_module({{{name!r}: images, **{nothing}}})", lambda x: module({name: x, **nothing})


def _calls(module: Any, batch: Any, images: Tensor) -> Iterator[Candidate]:
    """Yield other ways to pass images to the module, as its batches or its parts suggest."""
    if isinstance(batch, Mapping):
        for name in [name for name, value in batch.items() if value is images]:
            yield from _named_calls(module, name, [other for other in batch if other != name])
    elif isinstance(batch, (tuple, list)):
        yield "pl_module((images, None))", lambda x: module((x, None))
        yield "pl_module((images,))", lambda x: module((x,))
        yield "pl_module(images, None)", lambda x: module(x, None)
    yield "pl_module(images.flatten(1))", lambda x: module(x.flatten(1))
    parts = [
        (name, child) for name, child in module.named_children() if any(True for _ in child.parameters())
    ]
    if parts:
        code, chain = "images", nn.Sequential(*(child for _, child in parts))
        for name, _ in parts:
            code = f"pl_module.{name}({code})"
        yield code, chain
