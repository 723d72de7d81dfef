"""What loggers get besides the scalars, depending on what each can take, so that any logger works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gradsigns_lightning.core.utils.text import printable

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_SUMMARIES = {"ber": "min", "log10_p_value": "min", "p_value": "min", "margin": "max"}


def prepare_loggers(trainer: Trainer, name: str, settings: dict[str, Any]) -> None:
    """Write the public settings (the commitment, never the secret) into each run's configuration."""
    for logger in trainer.loggers:
        logger.log_hyperparams(
            {f"{name}/{k}": printable(v) if isinstance(v, str) else v for k, v in settings.items()}
        )
        # On first use of the run Lightning defines a catch-all metric itself, so ours must come after it.
        define_metric = getattr(_experiment(logger), "define_metric", None)
        if trainer.is_global_zero and callable(define_metric):
            for metric, summary in _SUMMARIES.items():
                define_metric(f"{name}/{metric}", summary=summary)


def log_margins(trainer: Trainer, name: str, margins: list[float] | None) -> None:
    """Log a table of bits and a histogram of margins to the loggers that can take them.

    The table shows which bits match and how safely, not their values.

    Args:
        trainer: the Trainer.
        name: prefix of the logged names.
        margins: ``(2 b_j - 1) z_j`` of every bit; None logs nothing.
    """
    if margins is None or not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            data = [[j, margin, margin > 0] for j, margin in enumerate(margins)]
            logger.log_table(f"{name}/bits", columns=["bit", "margin", "matches"], data=data)
        if any(c.__name__ == "WandbLogger" for c in type(logger).__mro__):
            import wandb

            _experiment(logger).log({f"{name}/margins": wandb.Histogram(margins)})
        elif hasattr(_experiment(logger), "add_histogram"):
            _experiment(logger).add_histogram(f"{name}/margins", torch.tensor(margins), trainer.global_step)


def _experiment(logger: Any) -> Any:
    # Lightning's base class does not require one.
    return getattr(logger, "experiment", None)
