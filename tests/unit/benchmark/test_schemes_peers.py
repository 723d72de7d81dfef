"""Uchida and Adi beyond what the command line shows."""

import copy
import math

import pytest
import torch
from torch import nn

from gradsigns_lightning.benchmark.schemes import Adi, Uchida
from gradsigns_lightning.benchmark.schemes.base import fresh_network

UCHIDA = Uchida(n_bits=64)


class Renamed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


@pytest.fixture(scope="module")
def carrier(owner):
    return UCHIDA.train(owner(epochs=2))


def with_weight(net, name, weight):
    """Return a copy with another parameter of that name."""
    twin = copy.deepcopy(net)
    module, _, last = name.rpartition(".")
    setattr(twin.get_submodule(module), last, nn.Parameter(weight))
    return twin


def test_uchidas_bits_are_lost_where_the_layer_has_another_size(owner, carrier):
    reader = UCHIDA.reader(owner())
    name = reader.secret.layer
    weight = carrier.get_parameter(name).detach()
    assert reader.read_weights(carrier).n_erasures == 0
    for changed in (
        with_weight(carrier, name, weight[:, 1:]),
        with_weight(carrier, name, weight[:0]),
        with_weight(carrier, name, weight[0]),
        with_weight(carrier, name, torch.tensor(1.0)),
        with_weight(carrier, name, weight * math.nan),
        nn.Identity(),
    ):
        found = reader.read_weights(changed)
        assert (found.n_erasures, found.verdict) == (64, "inconclusive")
        assert math.isnan(found.w)


def test_uchidas_layer_is_found_under_another_name(owner, carrier):
    reader = UCHIDA.reader(owner())
    expected, found = reader.read_weights(carrier), reader.read_weights(Renamed(carrier))
    assert (found.n_matches, found.w) == (expected.n_matches, expected.w)
    assert found.log10_p_value >= expected.log10_p_value


def test_uchidas_bits_outlast_what_does_not_touch_the_mean_filter(owner, carrier):
    reader = UCHIDA.reader(owner())
    weight = carrier.get_parameter(reader.secret.layer).detach()
    shuffled = with_weight(carrier, reader.secret.layer, weight[torch.randperm(len(weight))])
    expected, found = reader.read_weights(carrier), reader.read_weights(shuffled)
    assert (found.n_matches, found.w) == (expected.n_matches, pytest.approx(expected.w, rel=1e-3))


def test_uchidas_bits_are_not_shown_by_an_api(owner, carrier):
    assert UCHIDA.reader(owner()).read_responses(carrier).verdict == "inconclusive"


def test_adis_triggers_follow_from_the_seed(owner):
    first, again, other = (Adi(n_triggers=40).reader(owner(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.y, again.y)
    assert not torch.equal(first.x, other.x)
    assert not torch.equal(first.y, other.y)
    pixels = owner().images.raw(first.x)
    assert pixels.min() > -1e-6
    assert pixels.max() < 1 + 1e-6


def test_adis_triggers_tell_labels_and_scores_alike(owner):
    net, reader = fresh_network(owner()).eval(), Adi(n_triggers=40).reader(owner())

    class Labels(Renamed):
        def forward(self, x):
            return self.net(x).argmax(1)

    assert reader.read_responses(Labels(net)) == reader.read_weights(net)


@pytest.mark.parametrize("scheme", [UCHIDA, Adi(n_triggers=40)], ids=["uchida", "adi"])
def test_a_seed_decides_the_network(owner, scheme):
    first, again, other = (scheme.train(owner(seed, epochs=1)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
