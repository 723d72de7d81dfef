"""Finds, before the first batch, what cannot be signed, and reports it all at once."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradsigns_lightning.core.engines import Engine
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.watermarker import Watermarker
from gradsigns_lightning.integration.sharding import SHARDING_STRATEGIES, is_sharded

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

SUPPORTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", *SHARDING_STRATEGIES)
# They inherit from supported ones, but work differently.
UNSUPPORTED_SUBCLASSES = ("DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy")
SUPPORTED_PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed", "bf16-true")
# Their optimizers step with the per-sample gradients of the task's backward pass, which lack a term that is
# added to the loss.
PER_SAMPLE = ("AbstractGradSampleModule", "GradSampleModule", "GradSampleHooks")
PER_SAMPLE_OPTIMIZER = "DPOptimizer"
KINKED = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Threshold,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardshrink,
    nn.Softshrink,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
)


def check_compatible(trainer: Trainer, module: LightningModule, marker: Watermarker) -> None:
    """Raise one ``ValueError`` that lists everything that keeps this fit from being signed.

    What cannot be seen without a batch is found by :meth:`Watermarker.prepare` on the first one.
    """
    _refuse(
        [
            *_strategy_problems(trainer),
            *_trainer_problems(trainer, module),
            *_module_problems(module, marker.settings.carrier_layer),
            *_engine_problems(module, marker.engines, sharded=is_sharded(trainer)),
        ]
    )


def check_module(module: nn.Module, marker: Watermarker) -> None:
    """Raise one ``ValueError`` that lists what keeps a network from being signed in a Fabric loop."""
    _refuse(
        [
            *_module_problems(module, marker.settings.carrier_layer),
            *_engine_problems(module, marker.engines, sharded=False),
        ]
    )


def check_distinct(marks: Sequence[tuple[str, WatermarkKey]]) -> None:
    """Raise a ``ValueError`` if two of a Trainer's callbacks have the same name or key.

    Args:
        marks: name and key of each callback.
    """
    names, keys = [name for name, _ in marks], [key.commitment for _, key in marks]
    if len(set(names)) < len(names):
        raise ValueError(
            f"`name` must be different for every GradSigns callback of a Trainer, got {names}: give the "
            "second one its own, as in GradSigns(key, name='wm2')."
        )
    if len(set(keys)) < len(keys):
        raise ValueError(f"`key` must be different for every GradSigns callback of a Trainer, got {keys}.")


def _refuse(problems: list[str]) -> None:
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"GradSigns cannot sign this model in this Trainer:\n{listing}")


def _strategy_problems(trainer: Trainer) -> Iterator[str]:
    strategy: Any = trainer.strategy
    names = [c.__name__ for c in type(strategy).__mro__]
    if set(names).isdisjoint(SUPPORTED_STRATEGIES) or not set(names).isdisjoint(UNSUPPORTED_SUBCLASSES):
        yield (
            f"strategy {names[0]} is not supported (DeepSpeed runs its own backward pass, which does not "
            "support second derivatives; XLA is untested): use strategy='ddp', 'fsdp' or "
            "ModelParallelStrategy, or a single device."
        )
    if "FSDPStrategy" in names and isinstance(strategy.model, nn.Module):
        wrapped = [
            name
            for name, child in strategy.model.named_modules()
            if type(child).__name__ == "FullyShardedDataParallel"
        ]
        if len(wrapped) > 1:
            yield (
                f"FSDP wraps {len(wrapped) - 1} submodules separately, and loses gradients of modules that "
                "are called twice before the backward pass: leave `auto_wrap_policy` out, or use FSDP2 "
                "(ModelParallelStrategy)."
            )
    if (
        "ModelParallelStrategy" in names
        and trainer.world_size != strategy.distributed_sampler_kwargs["num_replicas"]
    ):
        yield (
            "tensor parallelism is not supported: use ModelParallelStrategy(tensor_parallel_size=1, "
            "data_parallel_size=...)."
        )
    # FSDP1 casts the weights themselves for mixed precision, so the embedding pass could not leave it.
    allowed = ("32-true",) if "FSDPStrategy" in names else ("32-true", "bf16-mixed")
    if is_sharded(trainer) and trainer.precision not in allowed:
        choices = " or ".join(map(repr, allowed))
        yield f"precision {trainer.precision!r} is not supported with {names[0]}, use {choices}."


def _trainer_problems(trainer: Trainer, module: LightningModule) -> Iterator[str]:
    if trainer.precision not in SUPPORTED_PRECISIONS:
        choices = ", ".join(map(repr, SUPPORTED_PRECISIONS))
        yield f"precision {trainer.precision!r} is not supported, use one of {choices}."
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            yield (
                "optimizer LBFGS evaluates the loss several times per step, but the embedding loss is added "
                "only once: use another."
            )
        if PER_SAMPLE_OPTIMIZER in _class_names(getattr(optimizer, "optimizer", optimizer)):
            yield (
                f"optimizer {type(optimizer).__name__} steps with per-sample gradients, which lack the mark: "
                "use another."
            )
    if not module.automatic_optimization and not hasattr(module, "watermark_loss"):
        yield (
            "automatic_optimization is False: the step has run its own backward pass before a loss can be "
            "added. Derive the module from GradSignsMixin and add `self.watermark_loss(batch)` to the loss "
            "before `manual_backward`."
        )


def _module_problems(module: nn.Module, carrier_layer: str | None) -> Iterator[str]:
    if carrier_layer is not None and carrier_layer not in (
        names := [name for name, _ in module.named_modules() if name]
    ):
        close = difflib.get_close_matches(carrier_layer, names, n=3, cutoff=0.3)
        similar = ", ".join(close) or "none"
        yield f"`carrier_layer` {carrier_layer!r} is not a submodule; similar names: {similar}."
    step = getattr(module, "training_step", None)
    if step is not None and "dataloader_iter" in inspect.signature(step).parameters:
        yield "`training_step` takes a `dataloader_iter`, which hides its batches: let it take a batch."
    for name, child in module.named_modules():
        if not _class_names(child).isdisjoint(PER_SAMPLE):
            yield (
                f"module {name or '(root)'!r} ({type(child).__name__}) collects per-sample gradients, as "
                "Opacus does for private training, which would lack the mark: sign the network by a short "
                "fit without it, or use strength=0."
            )
        if isinstance(child, _BatchNorm) and child.running_mean is None:
            yield (
                f"module {name or '(root)'!r} keeps no running statistics, so the images of a batch depend "
                "on each other in evaluation too, and a signature cannot be read from single images: let it "
                "track them, or use another normalization."
            )
        if _checkpoints_reentrantly(child):
            yield (
                f"module {name!r} checkpoints activations with use_reentrant=True, which does not support "
                "input gradients: set it to False."
            )


def _class_names(value: Any) -> set[str]:
    return {c.__name__ for c in type(value).__mro__}


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    if type(module).__name__ == "CheckpointWrapper":
        return str(getattr(module, "checkpoint_impl", "")).endswith("REENTRANT") and "NO_" not in str(
            module.checkpoint_impl
        )
    # Hugging Face models do it by a function of their own.
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    keywords = getattr(checkpoint, "keywords", {})
    return bool(getattr(module, "gradient_checkpointing", False)) and bool(keywords.get("use_reentrant"))


def _engine_problems(module: nn.Module, engines: Sequence[Engine], *, sharded: bool) -> Iterator[str]:
    if sharded and not any(engine.sharding_safe for engine in engines):
        names = ", ".join(repr(engine.name) for engine in engines)
        yield f"engine {names} is not safe for sharded parameters: use 'auto' or 'forward_over_reverse'."
    if all(engine.needs_smooth_activations for engine in engines):
        for name, child in module.named_modules():
            if isinstance(child, KINKED):
                yield (
                    f"module {name!r} ({type(child).__name__}) is not smooth, and engine {engines[0].name!r} "
                    "is wrong there: use another engine."
                )
