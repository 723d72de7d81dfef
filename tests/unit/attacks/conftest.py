"""A stolen model: a small network that carries a mark on digits, trained once for all tests of attacks."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from gradsigns_lightning import GradSigns, WatermarkKey, verify
from gradsigns_lightning.attacks.base import AttackData, Recipe
from gradsigns_lightning.data import Digits
from gradsigns_lightning.models import Classifier, SmallResNet

KEY = WatermarkKey.generate(
    "Acme",
    32,
    input_shape=(1, 8, 8),
    target_class=3,
    input_mean=(0.305,),  # of `Digits`
    input_std=(0.376,),
    secret=bytes(32),
)
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


@pytest.fixture(scope="session")
def judge(digits):
    """Return what reads a model: ``accuracy``, ``verify`` with the key, and ``log10_p_value``."""
    images, labels = digits.raw_images("test"), digits._source("test").labels
    natural = digits.raw_images("test", class_index=KEY.target_class)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (digits.mean, digits.std))

    @torch.no_grad()
    def accuracy(model):
        return (model.eval()((images - mean) / std).argmax(1) == labels).float().mean().item()

    def read(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return verify(model, KEY, natural)

    return SimpleNamespace(
        accuracy=accuracy, verify=read, log10_p_value=lambda model: read(model).log10_p_value
    )
