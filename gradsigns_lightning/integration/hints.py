"""The first call of the logits hook: what goes wrong there ends with the override that helps, tried on the model at hand."""

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
_PAD = "torch.nn.functional.pad({}, (1, 0))"  # the logit of class 0 is 0 then


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
        carrier_layer: as in the callback; inputs are taken as they are with it.
        sharded: parameters are sharded over the ranks; whether the logits depend on the images is not looked
            at then.

    Raises:
        ValueError: it fails, gives no logits or none that depend on the images; the message ends with an
            override of ``GradSigns.logits``.
    """
    with torch.no_grad(), frozen_statistics(module), twice_differentiable_kernels(module, images.device.type):
        few = images[:N_IMAGES]
        inputs, whole_fn = (few, logits_fn)
        if carrier_layer is None:
            inputs, whole_fn = carrier_inputs(module, logits_fn, few, key.input_shape, None)
        answer: Any = None
        try:
            answer = as_logits(whole_fn(inputs))
            class_logits(lambda _: answer, inputs, key.target_class)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if _is_logits(answer, len(inputs), 0):
                raise  # of fewer classes than the key's
            cure = _working([*_parts_of(answer), *_calls(module, batch, images)], inputs, key.target_class)
            raise ValueError(_explain(error, answer, cure)) from error
        if carrier_layer is None and not sharded and not _is_function_of(whole_fn, inputs):
            others = [
                (code, call) for code, call in _calls(module, batch, images) if _is_function_of(call, inputs)
            ]
            problem = ValueError(
                "`logits` must depend on the images through differentiable operations; those of "
                "`GradSigns.logits` have no "
                "gradient (a forward pass under `no_grad`, or through `detach`, NumPy or whole numbers?)."
            )
            raise ValueError(_explain(problem, answer, _working(others, inputs, key.target_class)))


def _explain(error: Exception, answer: Any, cure: str | None) -> str:
    first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
    what = (
        first_line
        if answer is not None
        else f"`GradSigns.logits` failed on images of the batch: {type(error).__name__}: {first_line}"
    )
    return (
        f"{what}\nOverride `GradSigns.logits` in a subclass, and use that as the callback"
        f"{'; this works here' if cure else ', for example'}:\n"
        f"    def logits(self, pl_module, images): return "
        f"{cure or 'pl_module.net(images)  # what gives (n, n_classes)'}"
    )


def _working(candidates: list[Candidate], inputs: Tensor, target_class: int) -> str | None:
    """Return the code of the first candidate that gives logits."""
    for code, call in candidates:
        try:
            answer = as_logits(call(inputs))
        except Exception:  # noqa: S112 - this one does not
            continue
        if _is_logits(answer, len(inputs), target_class):
            return code
    return None


def _is_logits(answer: Any, n: int, target_class: int) -> bool:
    return (
        isinstance(answer, Tensor)
        and answer.ndim == 2
        and answer.shape[0] == n
        and answer.shape[1] > max(target_class, 1)
        and answer.is_floating_point()
    )


def _is_function_of(call: Callable[[Tensor], Any], inputs: Tensor) -> bool:
    """Return whether the logits have a gradient by the inputs; True also where only an engine can tell."""
    with gradients_enabled():
        leaf = inputs.detach().clone().requires_grad_(True)
        try:
            answer = as_logits(call(leaf.clone()))
            return (
                answer.requires_grad
                and torch.autograd.grad(answer.sum(), leaf, allow_unused=True)[0] is not None
            )
        except Exception:
            return True


def _parts_of(answer: Any) -> Iterator[Candidate]:
    """Yield ways to logits from what the module gave for the images."""
    call = "pl_module(images)"
    if isinstance(answer, Mapping):
        yield from ((f"{call}[{name!r}]", lambda _, value=value: value) for name, value in answer.items())
    elif isinstance(answer, (tuple, list)):
        yield from ((f"{call}[{i}]", lambda _, value=value: value) for i, value in enumerate(answer))
    elif isinstance(answer, Tensor) and answer.ndim == 1:
        yield _PAD.format(f"{call}[:, None]"), lambda _: nn.functional.pad(answer[:, None], (1, 0))
    elif isinstance(answer, Tensor) and answer.ndim == 2 and answer.shape[1] == 1:
        yield _PAD.format(call), lambda _: nn.functional.pad(answer, (1, 0))
    elif isinstance(answer, Tensor) and answer.ndim > 2:
        yield f"{call}.flatten(1)", lambda _: answer.flatten(1)


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
