"""Trains one model and measures it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, Checkpoint

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.result import VerificationResult
from gradsigns_lightning.integration import GradSigns
from gradsigns_lightning.integration.standing import Standing
from gradsigns_lightning.runs import fit
from gradsigns_lightning.runs.callbacks import KeyKeeper
from gradsigns_lightning.runs.checkpoint import describe
from gradsigns_lightning.runs.own import build_callbacks, class_images
from gradsigns_lightning.verification import verify

WATERMARK_NAME = "wm"  # the callback's own


@dataclass
class Arm:
    """One trained model and what was measured on it."""

    name: str
    checkpoint: Path
    accuracy: float
    seconds_per_epoch: float
    result: VerificationResult
    standing: Standing | None


def train(
    settings: dict[str, Any],
    folder: Path,
    data: Any,
    key: WatermarkKey,
    *,
    logger: Any,
    name: str,
    keeper: KeyKeeper | None = None,
    callbacks: Sequence[Callback] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> Arm:
    """Train one model and measure it; the signed model and its twin differ only in the callback.

    Args:
        settings: resolved settings of ``gradsigns train``.
        folder: where the checkpoint is saved.
        data: the data module.
        key: the key to read the model with afterwards, and to sign it with if ``name`` is ``"signed"``.
        logger: the Trainer's logger, or None.
        name: ``"signed"``, ``"unmarked"`` or ``"twin"``.
        keeper: callback that saves a new key.
        callbacks: further callbacks, such as progress bars.
        tell: called with a line of text at each part of the work.
    """
    seed_everything(settings["seed"], verbose=False)
    classifier = fit.build_classifier(settings)
    watermark: list[Callback] = [fit.build_watermark(settings, key)] if name == "signed" else []
    kept: list[Callback] = [keeper] if keeper else []
    own = [
        c
        for c in build_callbacks(settings["callbacks"])
        if name != "twin" or not isinstance(c, (Checkpoint, GradSigns))
    ]
    # Before the fit, so that a checkpoint of any epoch says how its model is built; loggers have their own
    # hyperparameters.
    classifier.hparams.update(describe(settings["model"], settings["data"], key.commitment))
    trainer = fit.build_trainer(settings, [*watermark, *kept, *own, *callbacks], logger)
    network = settings["model"]["_target_"].rpartition(".")[2]
    tell(f"training the {name} model: {network} on {settings['data']['name']}")
    trainer.fit(classifier, datamodule=data)
    if keeper:
        keeper.keep()
    checkpoint = folder / ("twin.ckpt" if name == "twin" else "model.ckpt")
    trainer.save_checkpoint(checkpoint, weights_only=True)
    tell(f"testing the {name} model and reading the signature")
    accuracy = fit.test_accuracy(settings, classifier, data)
    result = verify(classifier, key, class_images(data, key), alpha=settings["alpha"])
    # From the metrics, because nothing else comes back from processes that a Trainer spawns.
    standing = Standing.from_metrics(trainer.callback_metrics, WATERMARK_NAME, key)
    return Arm(name, checkpoint, accuracy, fit.seconds_per_epoch(trainer), result, standing)
