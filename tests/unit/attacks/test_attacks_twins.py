from dataclasses import replace

import torch

from gradsigns_lightning.attacks.twins import train_twin, with_random_weights
from gradsigns_lightning.models import ViT


def test_a_twin_learns_the_task_and_not_the_mark(stolen, thief, judge):
    twin = train_twin(stolen, replace(thief, recipe=replace(thief.recipe, epochs=8)))
    assert judge.accuracy(twin) > 0.85
    assert judge.log10_p_value(twin) > -3


def test_no_weight_stays(stolen):
    fresh = with_random_weights(stolen)
    for (name, old), new in zip(stolen.named_parameters(), fresh.parameters(), strict=True):
        assert not torch.equal(old, new), name
    again, other = with_random_weights(stolen), with_random_weights(stolen, seed=1)
    assert torch.equal(fresh.head.weight, again.head.weight)
    assert not torch.equal(fresh.head.weight, other.head.weight)


def test_tables_without_a_layer_are_drawn_anew():
    network = ViT((1, 8, 8), 10, patch_size=4, dim=8, depth=1, heads=2)
    assert not torch.equal(network.position, with_random_weights(network).position)
