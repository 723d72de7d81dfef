"""Builds the objects of a fit from a resolved configuration."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.utils.checks import check_int
from gradsigns_lightning.core.utils.optional import require
from gradsigns_lightning.integration import GradSigns
from gradsigns_lightning.lazy import in_pythons_folder
from gradsigns_lightning.models import Classifier
from gradsigns_lightning.runs.build import build, is_target
from gradsigns_lightning.runs.callbacks import SECONDS_METRIC, EpochTimer
from gradsigns_lightning.runs.checkpoint import load_weights, read_checkpoint
from gradsigns_lightning.runs.options import argument_names, options
from gradsigns_lightning.runs.own import build_network

Settings = dict[str, Any]
_LIBRARY_FILES, _WANDB_FILES = ("matplotlibrc", ".numba_config.yaml"), ("wandb/settings", ".wandb/settings")

_FINAL = (
    *("n_matches", "bit_error_rate", "log10_p_value", "p_value", "margin", "accuracy", "seconds_per_epoch"),
    *("twin_accuracy", "twin_bit_error_rate", "twin_seconds_per_epoch"),
)


def build_classifier(settings: Settings) -> Classifier:
    """Return the classifier, with the weights of the checkpoint ``init`` if there is one.

    Raises:
        ValueError: the checkpoint cannot be read or does not fit.
    """
    classifier = Classifier(
        build_network(settings["model"]),
        settings["data"]["n_classes"],
        optimizer=partial(_optimizer, build(settings["optimizer"], option="optimizer", own_code=True)),
        lr_schedule=settings["lr_schedule"],
        label_smoothing=settings["label_smoothing"],
    )
    if settings["init"] is not None:
        load_weights(classifier, read_checkpoint(settings["init"], argument="init"), argument="init")
    return classifier


def _optimizer(make: Any, parameters: Any) -> Any:
    try:
        return make(parameters)
    except (TypeError, ValueError) as error:  # torch's message names no option
        raise type(error)(f"`optimizer`: {error}") from error


def build_watermark(settings: Settings, key: WatermarkKey) -> GradSigns:
    """Return the callback that signs.

    Raises:
        ValueError: a setting is out of its range, or does not fit the key.
    """
    # Hydra would mistake a key among the arguments for a configuration, since it is a dataclass.
    make = build({**settings["watermark"], "_partial_": True}, option="watermark")
    # `cadence` may be a number, for which the callback makes a cadence of that many steps.
    with options(
        {"every_n_steps": "watermark.cadence", **argument_names(settings["watermark"], "watermark")}
    ):
        callback: GradSigns = make(key)
    return callback


def build_trainer(settings: Settings, callbacks: Sequence[Callback], logger: Any) -> Trainer:
    """Return a Trainer that prints nothing except a progress bar among the callbacks.

    Raises:
        ValueError: the strategy would run this command again in every process, or its processes would read
            settings in the current folder.
    """
    if settings["trainer"].get("max_epochs") is not None:
        check_int("trainer.max_epochs", settings["trainer"]["max_epochs"], minimum=-1)
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    saving: Settings = {"enable_checkpointing": True} if saves else {}  # else as the configuration says
    trainer: Trainer = build(
        settings["trainer"],
        option="trainer",
        logger=logger or False,
        callbacks=[*callbacks, EpochTimer()],
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        **saving,
    )
    _check_children(trainer, uses_wandb=isinstance(logger, WandbLogger))
    spawns = type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher"
    if trainer.num_devices * trainer.num_nodes > 1 and not spawns:
        raise ValueError(
            "`trainer.strategy` must be 'ddp_spawn' or 'ddp_fork' on several devices (others run the whole "
            "command in every process, each with a key of its own); to train otherwise, use the GradSigns "
            "callback in a script."
        )
    return trainer


def _check_children(trainer: Trainer, *, uses_wandb: bool) -> None:
    """Refuse processes that would read a library's settings in the current folder, as this one does not."""
    found = [file for file in (*_LIBRARY_FILES, *(_WANDB_FILES if uses_wandb else ())) if Path(file).exists()]
    if found and type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher":
        raise ValueError(
            f"`trainer.strategy` must be of one process here: others would read {found[0]} in the current "
            "folder, which may not be yours. Start the command in another folder."
        )


def build_logger(settings: Settings) -> Any:
    """Return the logger, with the resolved configuration as its hyperparameters; None if there is none.

    Raises:
        ImportError: the logger's package is not installed.
    """
    logger = settings["logger"]
    if not logger:
        return None
    if is_target(logger, WandbLogger):
        with in_pythons_folder():
            require("wandb", extra="wandb")
        _set_up_wandb(offline=bool(logger.get("offline")))
        if logger.get("offline"):  # W&B prints forty lines; the command prints the run's folder at the end
            with redirect_stderr(io.StringIO()):
                return _started(
                    {
                        **logger,
                        "config": settings,
                        "settings": {"silent": True, **(logger.get("settings") or {})},
                    }
                )
        return build({**logger, "config": settings, "_recursive_": False}, option="logger")
    built = build(logger, option="logger")
    built.log_hyperparams(settings)
    return built


def _set_up_wandb(*, offline: bool) -> None:
    """Keep W&B from reading settings in the current folder, which may be a received one.

    The settings decide who gets the API key.
    """
    here = Path.cwd()
    if any((here / file).exists() for file in _WANDB_FILES):
        warnings.warn(
            f"{' and '.join(_WANDB_FILES)} in the current folder are not read: give W&B's settings by its "
            "variables WANDB_..., by logger.settings={...}, or in your own ~/.config/wandb/settings.",
            UserWarning,
            stacklevel=2,
        )
    repository = next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), None)
    with in_pythons_folder():
        import wandb

        settings: Settings = {"git_root": str(repository)} if repository else {}
        settings |= {"mode": "offline"} if offline else {}
        wandb.setup(wandb.Settings(**settings))


def _started(logger: Settings) -> Any:
    """Return a W&B logger whose run has begun, so that the first lines that W&B prints are printed now."""
    built = build({**logger, "_recursive_": False}, option="logger")
    _ = built.experiment
    return built


def build_twin_logger(settings: Settings) -> Any:
    """Return a CSV logger for the twin if the model has one.

    W&B keeps one run per command, whose summary has the twin's figures.
    """
    logger = settings["logger"]
    return build({**logger, "name": "twin"}) if logger and is_target(logger, CSVLogger) else None


def log_summary(logger: Any, summary: dict[str, Any]) -> Path | None:
    """Log the final figures and close the logger's run; a CSV file only has the figures of the epochs.

    Returns:
        The folder of an offline W&B run, which can be sent later; else None.
    """
    if logger is None or isinstance(logger, CSVLogger):
        return None
    logger.log_metrics({f"final/{name}": summary[name] for name in _FINAL if summary[name] is not None})
    logger.finalize("success")
    if not hasattr(logger.experiment, "finish"):
        return None
    folder = Path(logger.experiment.dir).parent
    logger.experiment.finish()
    return folder if getattr(logger, "_offline", False) else None


def test_accuracy(settings: Settings, classifier: Classifier, data: Any) -> float:
    """Return the accuracy on the test images, on one device, so that no image counts twice."""
    trainer = Trainer(
        accelerator=settings["trainer"].get("accelerator", "auto"),
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_test_batches=settings["trainer"].get("limit_test_batches"),
    )
    return float(trainer.test(classifier, datamodule=data, verbose=False)[0]["test/acc"])


def seconds_per_epoch(trainer: Trainer) -> float:
    """Return the median seconds of the training part of an epoch; NaN if no epoch was finished."""
    return float(trainer.callback_metrics.get(SECONDS_METRIC, math.nan))
