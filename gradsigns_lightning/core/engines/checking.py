"""Checks an engine on a few images before training: does it work on this model, and is its result right?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gradsigns_lightning.core.engines.base import EmbeddingLoss, Engine
from gradsigns_lightning.core.engines.exactness import inexact, warn_of_unchecked
from gradsigns_lightning.core.engines.finite_difference import STEP
from gradsigns_lightning.core.engines.forward_over_reverse import directional_derivative
from gradsigns_lightning.core.signature import LogitsFn, class_logits, input_gradients, unit
from gradsigns_lightning.core.torch_state.autograd import derivative, graph_nodes
from gradsigns_lightning.core.torch_state.contexts import twice_differentiable_kernels

N_IMAGES = 8
# Differences with two step sizes deviate by about 1e-3 on a smooth network, by more than 0.3 on a ReLU one.
CONSISTENCY = 0.05
# Rounding alone yields 1e-8, PyTorch's own formula for layer normalization 1e-3 to 4e-2.
SYMMETRY = 1e-4
# Prefixes of autograd's names for operations with a kink.
_KINKED = (
    "Relu",
    "LeakyRelu",
    "Prelu",
    "Rrelu",
    "Threshold",
    "Hard",
    "Softshrink",
    "MaxPool",
    "AdaptiveMaxPool",
)

_ADVICE = {
    "use_reentrant": "activation checkpointing must be called with use_reentrant=False",
    "_cudnn_rnn_backward": "cuDNN's recurrent kernels have no second derivative: run the layer without cuDNN",
    "attention": "fused attention has no second derivative: call it so that `torch.nn.attention.sdpa_kernel` "
    "can choose its kernel",
    "support double backward": "a compiled part of the model could not be run uncompiled: do not compile it",
    "saved during the original forward": "activation checkpointing does not recompute what forward mode "
    "saved",
    "jvp": "a custom autograd function has no forward-mode derivative",
    "forward AD": "an operation has no forward-mode derivative",
    "mutate a captured Tensor": "the model changes a buffer in place even in evaluation mode",
    "is not implemented": "an operation has no second derivative",
}


def check_engine(
    engine: Engine,
    module: nn.Module,
    logits_fn: LogitsFn,
    images: Tensor,
    target_class: int,
    *,
    sharded: bool,
) -> str | None:
    """Return why ``engine`` cannot embed in this model, in words, or None.

    Args:
        engine: the engine.
        module: module whose statistics are frozen already.
        logits_fn: maps inputs ``(n, ...)`` to logits ``(n, n_classes)``.
        images: inputs of any class; a few of them are used.
        target_class: class T.
        sharded: parameters are sharded, so their gradients cannot be computed here.
    """
    images = images[:N_IMAGES]
    try:
        # Around the backward passes too, because this runs inside the step's autocast, unlike the task's own
        # backward pass.
        with twice_differentiable_kernels(module, images.device.type):
            logits_fn = _unsaturated(logits_fn, images, target_class)
            if sharded:
                _refuse_recomputation(logits_fn, images)
            loss = engine.embed(module, logits_fn, images, target_class, _fixed_direction)
            problem = _unreached(loss, module, sharded=sharded)
            if problem is None and engine.needs_forward_mode:
                problem = _asymmetric(module, logits_fn, images, target_class)
            if problem is None and engine.needs_smooth_activations:
                problem = _kinked(getattr(engine, "step", STEP), logits_fn, images, target_class)
            if problem is None and not sharded:
                problem = inexact(engine, module, logits_fn, images, target_class, _fixed_direction)
            # An engine for smooth activations takes first derivatives only, which need no such check.
            elif problem is None and not engine.needs_smooth_activations:
                warn_of_unchecked(logits_fn, images, target_class)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return _explain(error)
    return problem


def _unsaturated(logits_fn: LogitsFn, images: Tensor, target_class: int) -> LogitsFn:
    # Before training BatchNorm's statistics may be far off, and logits of 1e8 would make the softmax, and so
    # everything that is checked here, constant.
    with torch.no_grad():
        scale = class_logits(logits_fn, images, target_class).abs().amax().clamp_min(1.0)
    return lambda x: class_logits(logits_fn, x, target_class) / scale


def _refuse_recomputation(logits_fn: LogitsFn, images: Tensor) -> None:
    """Raise if activations are checkpointed.

    They would be recomputed in the task's backward pass, when the statistics are no longer frozen.
    """
    with torch.autograd.graph.disable_saved_tensors_hooks(
        "activation checkpointing is not supported with sharded parameters, whose gradients come in the "
        "task's own backward pass"
    ):
        logits_fn(images)


def _fixed_direction(gradients: Tensor) -> Tensor:
    # Random, so that no pooling or patch can cancel it; from a generator of its own, so that it is the same
    # on all ranks and leaves the task's generator as it is.
    direction = torch.randn(gradients.shape[1:], generator=torch.Generator().manual_seed(0))
    return (gradients.mean(0) * direction.to(gradients)).sum()


def _unreached(loss: EmbeddingLoss, module: nn.Module, *, sharded: bool) -> str | None:
    if not loss.surrogate.requires_grad:
        return "the embedding loss carries no graph"
    # `autograd.grad` silently bypasses such a node; only the task's full backward pass would reach it.
    if "torch::autograd::Error" in _operations(loss.surrogate):
        return "a custom autograd function is marked once_differentiable, so it has no second derivative"
    gradients: tuple[Tensor | None, ...] = (loss.surrogate.detach(),)
    if not sharded:
        parameters = [p for p in module.parameters() if p.requires_grad]
        gradients = derivative(loss.surrogate, parameters)
        if all(g is None or not g.any() for g in gradients):
            return "the embedding loss reaches no trainable parameter"
    if not all(bool(g.isfinite().all()) for g in gradients if g is not None):
        return "the second derivative is not finite (a root or a norm at zero?)"
    return None


def _operations(value: Tensor) -> Iterator[str]:
    """Yield the names of the operations in the graph of ``value``."""
    return (node.name() for node in graph_nodes(value))


def _kinked(step: float, logits_fn: LogitsFn, images: Tensor, target_class: int) -> str | None:
    """Return why finite differences are wrong on this network, or None.

    Looks for operations with a kink, and compares the gradient's change over the engine's step and over half
    of it.
    """
    logits = class_logits(logits_fn, images.detach().requires_grad_(), target_class)
    # Also by their names, because a few images may happen to cross no kink of a small network.
    found = sorted(
        {name.partition("Backward")[0] for name in _operations(logits) if name.startswith(_KINKED)}
    )
    if found:
        return f"the network has kinks ({', '.join(found)}) and finite differences would be wrong"
    direction = unit(input_gradients(logits_fn, images, target_class).mean(0))
    radius = step * images.flatten(1).norm(dim=1).square().mean().sqrt()

    def curvature(size: Tensor) -> Tensor:
        both = torch.cat([images + size * direction, images - size * direction])
        ahead, behind = input_gradients(logits_fn, both, target_class).chunk(2)
        return (ahead - behind) / (2 * size)

    whole, half = curvature(radius), curvature(radius / 2)
    deviation = float((whole - half).norm() / whole.norm())
    if deviation <= CONSISTENCY:
        return None
    return (
        f"finite differences of two step sizes differ by {deviation:.0%}, so the network has kinks or bends "
        "too sharply and they would be wrong"
    )


def _asymmetric(module: nn.Module, logits_fn: LogitsFn, images: Tensor, target_class: int) -> str | None:
    """Return why forward mode is wrong on this network, or None.

    Compares u H v with v H u, where H is the second derivative of the loss: a formula that neglects a
    dependence breaks the symmetry.
    """
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(images.shape, generator=generator).to(images) for _ in range(2))

    def times(direction: Tensor) -> Tensor:
        leaf = images.detach().requires_grad_()
        slope = directional_derivative(module, logits_fn, leaf, target_class, direction)
        return torch.autograd.grad(slope, leaf)[0]

    hv, hu = times(v), times(u)
    deviation = float(((u * hv).sum() - (v * hu).sum()).abs() / (u.norm() * hv.norm()).clamp_min(1e-30))
    if deviation <= SYMMETRY:
        return None
    return (
        f"a forward-mode derivative cannot be differentiated again (asymmetry {deviation:.1e}), so it would "
        "be wrong"
    )


def _explain(error: RuntimeError) -> str:
    message = str(error).strip().split("\n")[0]
    advice = next((advice for words, advice in _ADVICE.items() if words in str(error)), None)
    return f"{advice} ({message})" if advice else message
