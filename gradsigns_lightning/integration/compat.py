"""What cannot be signed yet, found before the first batch and reported all at once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradsigns_lightning.core.engines import Engine
from gradsigns_lightning.core.key import WatermarkKey

SUPPORTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
UNSUPPORTED_SUBCLASSES = ("DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy")  # one of them by inheritance only
SUPPORTED_PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed")


def check_compatible(trainer: Any, module: Any, engine: Engine) -> None:
    """Raise one ``ValueError`` that lists all that keeps this fit from being signed."""
    problems = [*_trainer_problems(trainer, module), *_module_problems(module, engine)]
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"GradSigns cannot sign this model in this Trainer:\n{listing}")


def _trainer_problems(trainer: Any, module: Any) -> Iterator[str]:
    strategies = [c.__name__ for c in type(trainer.strategy).__mro__]
    if set(strategies).isdisjoint(SUPPORTED_STRATEGIES) or not set(strategies).isdisjoint(UNSUPPORTED_SUBCLASSES):
        yield (
            f"strategy {strategies[0]} is not supported: sharded parameters are gone when the second derivative needs them, and "
            "XLA is untested. Use strategy='ddp', or a single device."
        )
    if trainer.precision not in SUPPORTED_PRECISIONS:
        yield f"precision {trainer.precision!r} is not supported, use one of {', '.join(map(repr, SUPPORTED_PRECISIONS))}."
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            yield "optimizer LBFGS evaluates the loss several times a step, the embedding loss is added once; use another."
    if not module.automatic_optimization and not hasattr(module, "watermark_loss"):
        yield (
            "automatic_optimization is False: the step has run its own backward pass before a loss can be added. Derive the "
            "module from GradSignsMixin and add `self.watermark_loss(batch)` to the loss before `manual_backward`."
        )


def _module_problems(module: Any, engine: Engine) -> Iterator[str]:
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        yield "`training_step` takes a `dataloader_iter`, so its batches are never seen: let it take a batch."
    for name, value in getattr(module, "hparams", {}).items():
        if isinstance(getattr(value, "key", value), WatermarkKey):
            yield (
                f"hyperparameter {name!r} holds the key, whose secret every checkpoint would contain: "
                f"call `save_hyperparameters(ignore={name!r})`."
            )
    for name, child in module.named_modules():
        if isinstance(child, _BatchNorm) and child.running_mean is None:
            yield (
                f"module {name or '(root)'!r} keeps no running statistics, so images of a batch depend on each other in "
                "evaluation too, and a signature cannot be read from single ones: let it track them, or normalise otherwise."
            )
    yield from _compiled(module, engine)


def _compiled(module: nn.Module, engine: Engine) -> Iterator[str]:
    for name, child in module.named_modules():
        compiled = hasattr(child, "_orig_mod") or getattr(child, "_compiled_call_impl", None) is not None
        if compiled and not engine.compile_safe:
            yield f"module {name or '(root)'!r} is compiled; engine {engine.name!r} cannot differentiate that: do not compile it."
    if getattr(module, "_compiler_ctx", None) and not engine.compile_safe:
        yield f"the LightningModule is compiled; engine {engine.name!r} cannot differentiate that: do not compile it."
