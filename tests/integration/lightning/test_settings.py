"""The settings of embedding are listed once: callback, mixin and Fabric take them from there."""

import dataclasses
import inspect

import pytest
from lightning.fabric import Fabric
from signed_digits import Net, make_key, make_trainer, train_loader

from gradsigns_lightning import (
    Cadence,
    FabricGradSigns,
    GradSigns,
    GradSignsMixin,
    MarginObjective,
    StrengthSchedule,
)
from gradsigns_lightning.core import EmbeddingSettings, Watermarker

OTHERS = {
    "strength": StrengthSchedule(2.0, warmup_steps=3),
    "objective": MarginObjective(0.3),
    "engine": "forward_over_reverse",
    "cadence": Cadence(7),
    "n_images": 9,
    "momentum": 0.25,
    "carrier_layer": "net.1",
}


class Mixed(GradSignsMixin, Net):
    """Brings its own mark."""


def by_callback(key, **settings):
    return GradSigns(key, **settings).watermarker


def by_mixin(key, **settings):
    return Mixed().sign_with(key, **settings).watermarker


def by_fabric(key, **settings):
    return FabricGradSigns(Fabric(accelerator="cpu", devices=1), key, **settings).watermarker


WAYS = [by_callback, by_mixin, by_fabric]


def test_the_callback_has_all_of_them_with_the_same_defaults():
    parameters = inspect.signature(GradSigns).parameters
    assert {
        field.name: parameters[field.name].default for field in dataclasses.fields(EmbeddingSettings)
    } == vars(EmbeddingSettings())
    assert set(OTHERS) == set(vars(EmbeddingSettings()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OTHERS)
def test_each_of_them_arrives(way, name):
    assert way(make_key(8), **{name: OTHERS[name]}).settings == EmbeddingSettings(**{name: OTHERS[name]})


@pytest.mark.parametrize("way", WAYS)
def test_a_watermarker_is_used_as_it_is(way):
    marker = Watermarker(make_key(8), EmbeddingSettings(momentum=0.25))
    assert way(marker) is marker
    assert way(marker, momentum=EmbeddingSettings().momentum) is marker


@pytest.mark.parametrize("way", WAYS)
def test_settings_beside_a_watermarker_are_refused(way):
    with pytest.raises(
        ValueError, match=r"`momentum` must not be given together with a `Watermarker`, .*n_images=5"
    ):
        way(Watermarker(make_key(8), EmbeddingSettings(n_images=5)), momentum=0.25, carrier_layer="net.1")


def test_a_fit_with_a_watermarker_is_one_with_its_settings():
    states = []
    for given in (make_key(8), Watermarker(make_key(8), EmbeddingSettings(cadence=3))):
        settings = {} if isinstance(given, Watermarker) else {"cadence": 3}
        mark = GradSigns(given, name="ours", n_val_images=0, **settings)
        make_trainer(mark, max_epochs=1).fit(Net(), train_loader(200, shuffle=False))
        states.append({**mark.state_dict()["watermarker"], "name": mark.name, "key": mark.key.commitment})
    first, second = states
    assert first["last_step"] == 4
    assert first.pop("mean_gradient").equal(second.pop("mean_gradient"))
    assert first == second
