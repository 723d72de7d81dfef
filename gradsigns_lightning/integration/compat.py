"""What cannot be signed yet, found before the first batch and reported all at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gradsigns_lightning.core.engines import Engine

SUPPORTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
SUPPORTED_PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed")


def check_compatible(trainer: Any, module: Any, engine: Engine) -> None:
    """Raise one ``ValueError`` that lists all that keeps this fit from being signed."""
    problems = [*_trainer_problems(trainer, module), *_module_problems(module, engine)]
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"GradSigns cannot sign this model in this Trainer:\n{listing}")


def _trainer_problems(trainer: Any, module: Any) -> Iterator[str]:
    strategy = type(trainer.strategy)
    if not {c.__name__ for c in strategy.__mro__} & set(SUPPORTED_STRATEGIES):
        yield (
            f"strategy {strategy.__name__} is not supported: sharded parameters are gone when the second derivative needs them. "
            "Use strategy='ddp', or a single device."
        )
    if trainer.precision not in SUPPORTED_PRECISIONS:
        yield f"precision {trainer.precision!r} is not supported, use one of {', '.join(map(repr, SUPPORTED_PRECISIONS))}."
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            yield "optimizer LBFGS evaluates the loss several times a step, the embedding loss is added once; use another optimizer."
    if not module.automatic_optimization and not hasattr(module, "watermark_loss"):
        yield (
            "automatic_optimization is False: the step has run its own backward pass before a loss can be added. Derive the "
            "module from GradSignsMixin and add `self.watermark_loss(batch)` to the loss before `manual_backward`."
        )


def _module_problems(module: nn.Module, engine: Engine) -> Iterator[str]:
    for name, child in module.named_modules():
        compiled = hasattr(child, "_orig_mod") or getattr(child, "_compiled_call_impl", None) is not None
        if compiled and not engine.compile_safe:
            yield f"module {name or '(root)'!r} is compiled, which engine {engine.name!r} cannot differentiate twice: do not compile it."
    if getattr(module, "_compiler_ctx", None) and not engine.compile_safe:
        yield f"the LightningModule is compiled, which engine {engine.name!r} cannot differentiate twice: do not compile it."
