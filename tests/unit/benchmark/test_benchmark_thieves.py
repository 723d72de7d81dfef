import hashlib
import warnings

import pytest
import torch

from gradsigns_lightning import WatermarkKey, verify
from gradsigns_lightning.attacks import Overwriting
from gradsigns_lightning.attacks.base import Recipe
from gradsigns_lightning.benchmark.schemes.base import fresh_network
from gradsigns_lightning.benchmark.thieves import thief_of


def thiefs_key(data, number):
    return WatermarkKey.generate(
        "thief",
        32,
        input_shape=data.input_shape,
        target_class=0,
        input_mean=data.mean,
        input_std=data.std,
        secret=hashlib.sha256(f"thief, class 0, key {number}".encode()).digest(),
    )


def test_a_thief_embeds_a_key_of_their_own(owner, unmarked):
    data = owner().data
    thief = thief_of(data, Recipe(rate=3e-3, epochs=8, batch_size=32), share=1.0, n_bits=32)
    attacked = Overwriting(epochs=6)(unmarked, thief)
    images = data.raw_images("test", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own, other = (verify(attacked, thiefs_key(data, number), images) for number in (0, 1))
        before = verify(unmarked, thiefs_key(data, 0), images)
    assert own.n_matches >= 30
    assert max(other.n_matches, before.n_matches) < 28


def test_a_thief_has_a_third_that_is_drawn_from_the_training_images(owner):
    data = owner().data
    thief = thief_of(data, Recipe(), share=1 / 3, n_bits=32)
    assert thief.n_images == round(len(data.load_train_and_val()[0]) / 3)
    theirs = {x.numpy().tobytes() for x, _ in (thief.clean[i] for i in range(thief.n_images))}
    mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in (data.mean, data.std))
    for split in ("val", "test"):
        held_out = (data.raw_images(split) - mean) / std
        assert theirs.isdisjoint(x.numpy().tobytes() for x in held_out)


def test_no_share_is_refused(owner):
    with pytest.raises(ValueError, match="`share` must leave the thief an image"):
        thief_of(owner().data, Recipe(), share=0.0, n_bits=32)


def test_the_network_is_the_seeds(owner):
    first, again, other = (fresh_network(owner(seed)).state_dict() for seed in (0, 0, 1))
    name = next(iter(first))
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
