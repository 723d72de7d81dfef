"""A stolen model: a small network that carries a mark on digits, trained once for all tests of attacks."""

import copy
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from gradsigns_lightning import GradSigns, WatermarkKey, verify
from gradsigns_lightning.attacks.base import AttackData, Recipe
from gradsigns_lightning.core.settings import EmbeddingSettings
from gradsigns_lightning.core.watermarker import Watermarker
from gradsigns_lightning.data import Digits
from gradsigns_lightning.models import Classifier, SmallResNet

# Normalized as `Digits` does, or the judge would show the network other images than it was trained on.
KIND = {"n_bits": 32, "input_shape": (1, 8, 8), "input_mean": 0.305, "input_std": 0.376}
KEY = WatermarkKey.generate("Acme", target_class=3, secret=bytes(32), **KIND)
RECIPE = Recipe(rate=3e-3, epochs=16, batch_size=32)


@pytest.fixture(scope="session")
def digits():
    data = Digits(batch_size=RECIPE.batch_size)
    data.setup()
    return data


@pytest.fixture(scope="session")
def trained(digits):
    """Return a marked and an unmarked network; they are copied before use."""
    return {name: _trained(digits, marked=name == "marked") for name in ("marked", "unmarked")}


def _trained(digits, *, marked):
    seed_everything(0, verbose=False)
    classifier = Classifier(SmallResNet(1, 10, width=16), 10, label_smoothing=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_epochs=RECIPE.epochs,
            callbacks=[GradSigns(KEY, strength=2.0)] if marked else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(classifier, datamodule=digits)
    return classifier.net.eval()


@pytest.fixture
def stolen(trained):
    return copy.deepcopy(trained["marked"])


@pytest.fixture
def unmarked(trained):
    return copy.deepcopy(trained["unmarked"])


@pytest.fixture(scope="session")
def thief(digits):
    """What the thief has: a third of the training images."""
    return AttackData.of(digits, RECIPE)


class OwnMark:
    """A mark with a key of the thief's own."""

    def __init__(self, target_class, number):
        secret = bytes([1 + target_class, 1 + number] * 16)
        self.key = WatermarkKey.generate("Thief", target_class=target_class, secret=secret, **KIND)
        self.watermarker = Watermarker(self.key, EmbeddingSettings(strength=5.0, cadence=1))

    def loss(self, model, x, y, step):
        return self.watermarker.step(model, model, x, y, step=step)

    def before_step(self, parameters, step):
        self.watermarker.observe_gradients(0, parameters, step=step)


@pytest.fixture(scope="session")
def armed(thief):
    """What a thief has who can embed marks of their own."""
    return replace(thief, make_mark=OwnMark)


@pytest.fixture(scope="session")
def judge(digits):
    """Return what reads a model: ``accuracy``, ``verify`` with the key, and ``log10_p_value``."""
    images, labels = digits.raw_images("test"), digits._source("test").labels
    natural = digits.raw_images("test", class_index=KEY.target_class)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (digits.mean, digits.std))

    @torch.no_grad()
    def accuracy(model):
        return (model.eval()((images - mean) / std).argmax(1) == labels).float().mean().item()

    def read(model, key=KEY):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return verify(model, key, natural)

    return SimpleNamespace(
        accuracy=accuracy, verify=read, log10_p_value=lambda model: read(model).log10_p_value
    )
