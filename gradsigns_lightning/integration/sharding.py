"""Strategies that shard the parameters over the ranks, where every forward pass is a collective operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

SHARDING_STRATEGIES = ("FSDPStrategy", "ModelParallelStrategy")


def is_sharded(trainer: Trainer) -> bool:
    """Return whether the Trainer's strategy shards parameters."""
    return any(c.__name__ in SHARDING_STRATEGIES for c in type(trainer.strategy).__mro__)


def inside_forward(trainer: Trainer, pl_module: LightningModule, function: Callable[[], None]) -> None:
    """Call ``function`` where the parameters are whole: inside the strategy's wrapper, if it has one.

    Training steps run there anyway (Lightning redirects the wrapper's forward); hooks do not.
    """
    wrapper = trainer.strategy.model
    if wrapper is None or wrapper is pl_module or not is_sharded(trainer):
        function()
        return
    previous = vars(pl_module).get("forward")

    def restore() -> None:
        if previous is None:
            vars(pl_module).pop("forward", None)
        else:
            pl_module.forward = previous  # type: ignore[method-assign]

    def redirected(*_args: Any, **_kwargs: Any) -> None:
        restore()  # what `function` calls is the module's own
        function()

    pl_module.forward = redirected  # type: ignore[method-assign]
    try:
        wrapper()
    finally:
        restore()
