"""Owners of small networks on digits, by seed."""

import pytest

from gradsigns_lightning.attacks.base import Recipe
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.benchmark.schemes.base import Owner, fresh_network
from gradsigns_lightning.data import Digits

NETWORK = {
    "_target_": "gradsigns_lightning.models.MLP",
    "input_shape": [1, 8, 8],
    "n_classes": 10,
    "hidden": [256, 128],
}


@pytest.fixture(scope="session")
def owner():
    """Return what makes the owner of a seed, who trains for so many epochs."""
    data = Digits(batch_size=64)
    data.setup()

    def of(seed=0, *, epochs=8, network=NETWORK):
        return Owner({"model": network, "seed": seed}, data, Recipe(epochs=epochs, batch_size=64), 1e-9, 1000)

    return of


@pytest.fixture(scope="session")
def unmarked(owner):
    return train(fresh_network(owner()), owner().images, owner().recipe, seed=0)
