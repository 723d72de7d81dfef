"""This package's own mark, and no mark at all."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass

from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn

from gradsigns_lightning.benchmark.measuring import KeyReader, Reader
from gradsigns_lightning.benchmark.schemes.base import Owner
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.runs import fit
from gradsigns_lightning.runs.build import build


@dataclass(frozen=True)
class GradSignsScheme:
    """GradSigns as ``gradsigns train`` embeds it, with the configuration's key and strength."""

    def train(self, owner: Owner) -> nn.Module:
        """Return a network that is trained by Lightning with the callback."""
        return _trained(owner, [fit.build_watermark(owner.settings, key_of(owner))])

    def reader(self, owner: Owner) -> Reader:
        """Return what reads the key from weights and responses."""
        return _reader(owner)


@dataclass(frozen=True)
class Unmarked:
    """The same training without a mark, read with a key that nobody embedded: what false alarms look like."""

    def train(self, owner: Owner) -> nn.Module:
        """Return an unmarked network."""
        return _trained(owner, [])

    def reader(self, owner: Owner) -> Reader:
        """Return what reads the key from weights and responses."""
        return _reader(owner)


def key_of(owner: Owner) -> WatermarkKey:
    """Return the owner's key, which follows from the seed: it proves nothing to anybody else."""
    secret = hashlib.sha256(f"gradsigns benchmark, seed {owner.seed}".encode()).digest()
    key: WatermarkKey = build(owner.settings["key"], option="key", secret=secret)
    return key


def _trained(owner: Owner, watermark: list[Callback]) -> nn.Module:
    seed_everything(owner.seed, verbose=False)
    classifier = fit.build_classifier({**owner.settings, "init": None})
    trainer = fit.build_trainer(owner.settings, watermark, None)
    with warnings.catch_warnings():
        # A mark that does not hold stands in the records.
        warnings.filterwarnings("ignore", category=UserWarning)
        trainer.fit(classifier, datamodule=owner.data)
    return classifier.net.cpu().eval()


def _reader(owner: Owner) -> Reader:
    key = key_of(owner)
    images = owner.data.raw_images("test", key.target_class)
    return KeyReader(key, images, alpha=owner.alpha, max_queries=owner.max_queries)
