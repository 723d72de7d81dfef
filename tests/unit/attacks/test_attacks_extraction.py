"""Networks that learn from the stolen one's answers, and transfer to another task and back."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from gradsigns_lightning.attacks.base import AttackData, fetch
from gradsigns_lightning.attacks.ensembles import Ensemble, extract_ensemble
from gradsigns_lightning.attacks.extraction import (
    distill,
    extract_adversarially,
    reset,
    retrain,
    student,
    with_answers,
)
from gradsigns_lightning.attacks.repair import adversarial
from gradsigns_lightning.attacks.transfer import into, rotated, transfer_to_rotations
from gradsigns_lightning.models import MLP, ResNet20, SmallResNet, ViT

ADVERSARIAL = {"radii": (0.1,), "n_steps": 3, "n_images": 50, "step": 0.05}
SHORT = {
    retrain: {"epochs": 2},
    distill: {"epochs": 2},
    extract_adversarially: {**ADVERSARIAL, "epochs": 2},
    extract_ensemble: {"epochs": 1, "n_networks": 2},
    transfer_to_rotations: {"rotation_epochs": 1, "epochs": 1},
}
EXTRACTIONS = [attack for attack in SHORT if attack is not transfer_to_rotations]


def name(attack):
    return getattr(attack, "__name__", "")


def weights(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("attack", SHORT, ids=name)
def test_a_network_is_trained_and_all_else_stays(attack, stolen, thief):
    stolen.train()
    before, flags = copy.deepcopy(stolen.state_dict()), [m.training for m in stolen.modules()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    doses = []
    attacked = attack(stolen, thief, observe=lambda dose, model: doses.append(dose), **SHORT[attack])
    assert all(torch.equal(before[name], value) for name, value in stolen.state_dict().items())
    assert flags == [m.training for m in stolen.modules()]
    assert torch.equal(state[0], torch.get_rng_state())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]
    assert not any(m.training for m in attacked.modules())
    assert doses == [1, 2]
    assert torch.equal(weights(attack(stolen, thief, **SHORT[attack])), weights(attacked))


@pytest.mark.parametrize(
    "network", [MLP((1, 8, 8), 10, (16,)), ViT((1, 8, 8), 10, patch_size=4, dim=8, heads=2)]
)
@pytest.mark.parametrize("attack", SHORT, ids=name)
def test_networks_without_convolutions_and_batch_norm_are_attacked(attack, network, thief):
    attacked = attack(network, thief.part(torch.arange(64)), **SHORT[attack])
    assert weights(attacked).isfinite().all()
    with torch.no_grad():
        assert attacked(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize(
    ("attack", "setting"),
    [
        (retrain, {"network": "new"}),
        (retrain, {"answers": "some"}),
        (retrain, {"epochs": 0}),
        (distill, {"temperature": 0.0}),
        (distill, {"alpha": 1.5}),
        (extract_adversarially, {"n_steps": 0}),
        (extract_ensemble, {"n_networks": 0}),
        (extract_ensemble, {"n_networks": 10**6}),
        (extract_ensemble, {"smoothing": -0.1}),
        (transfer_to_rotations, {"rotation_epochs": 0}),
        (transfer_to_rotations, {"labels": "none"}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_settings_are_checked(attack, setting, stolen, thief):
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` must be"):
        attack(stolen, thief, **{**SHORT[attack], **setting})


# --- what a student starts from


@pytest.mark.parametrize(
    "model",
    [
        SmallResNet(1, 10, width=8),
        ViT((1, 8, 8), 10, dim=16),
        nn.TransformerEncoderLayer(16, 2, 16, batch_first=True),
    ],
    ids=lambda model: type(model).__name__,
)
def test_nothing_of_the_stolen_weights_stays(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    renewed = reset(copy.deepcopy(model))
    for (label, before), after in zip(model.named_parameters(), renewed.parameters(), strict=True):
        assert not torch.isclose(before, after).any(), label
    assert torch.corrcoef(torch.stack([vector(model), vector(renewed)]))[0, 1].abs() < 0.1


def test_running_statistics_start_anew(stolen, thief):
    fresh = student(stolen, thief, "same", 0)
    assert stolen.stem[1].running_mean.abs().max() > 0.01
    assert not fresh.stem[1].running_mean.any()
    assert torch.equal(weights(student(stolen, thief, "same", 0)), weights(fresh))
    assert not torch.equal(vector(student(stolen, thief, "same", 1)), vector(fresh))


def test_another_network_is_taken(stolen, thief):
    assert isinstance(student(stolen, thief, "other", 0), ResNet20)
    other = student(ResNet20(1, 10), thief, "other", 0)
    assert isinstance(other, SmallResNet)
    assert other.head.in_features == 4 * 32
    given = MLP((1, 8, 8), 10, (16,))
    kept = retrain(stolen, thief, network=given, epochs=1, rate_factor=0.0)
    assert kept is not given
    assert torch.equal(vector(kept), vector(given))
    made = retrain(stolen, thief, network=lambda: MLP((1, 8, 8), 10, (16,)), epochs=1)
    assert isinstance(made, MLP)


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (3, TypeError, "`network` must be or make a torch.nn.Module, got int"),
        (lambda: "net", TypeError, "`network` must be or make a torch.nn.Module, got str"),
        (MLP((1, 8, 8), 7), ValueError, r"`network` must answer an image with 10 scores, got \(1, 7\)"),
    ],
    ids=["number", "maker", "classes"],
)
def test_what_is_no_network_is_refused(stolen, thief, network, error, message):
    with pytest.raises(error, match=message):
        retrain(stolen, thief, network=network, epochs=1)


# --- what a student learns


@pytest.mark.parametrize("attack", EXTRACTIONS, ids=name)
def test_the_true_labels_are_not_needed(attack, stolen, thief):
    blind = thief.relabelled(torch.zeros(thief.n_images, dtype=torch.long))
    assert torch.equal(
        weights(attack(stolen, blind, **SHORT[attack])), weights(attack(stolen, thief, **SHORT[attack]))
    )


@pytest.mark.parametrize(
    ("attack", "settings"),
    [
        (retrain, {"epochs": 8}),
        (retrain, {"epochs": 8, "answers": "labels"}),
        (distill, {"epochs": 8}),
        (extract_adversarially, {**ADVERSARIAL, "epochs": 8}),
        (extract_ensemble, {"epochs": 10}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_function_is_extracted_and_the_mark_is_not(attack, settings, stolen, thief, judge):
    attacked = attack(stolen, thief, **settings)
    assert judge.accuracy(attacked) > 0.85
    assert judge.log10_p_value(attacked) > -3 > judge.log10_p_value(stolen)


def test_another_architecture_learns_too(stolen, thief, judge):
    attacked = retrain(stolen, thief, network="other", epochs=3)
    assert isinstance(attacked, ResNet20)
    assert judge.accuracy(attacked) > 0.85


def test_answers_are_those_of_the_stolen_model(stolen, thief):
    x, y = next(iter(with_answers(stolen, thief, "probabilities").in_order(64)))
    with torch.no_grad():
        torch.testing.assert_close(stolen(x).softmax(1), y, atol=1e-5, rtol=1e-4)
        _, labels = next(iter(with_answers(stolen, thief, "labels").in_order(64)))
        assert torch.equal(stolen(x).argmax(1), labels)
    assert with_answers(stolen, thief, "probabilities").recipe.label_smoothing == 0
    assert with_answers(stolen, thief, "labels").recipe == thief.recipe


def test_distillation_of_the_class_alone_is_retraining_with_labels(stolen, thief):
    hard = replace(thief, recipe=replace(thief.recipe, label_smoothing=0.0))
    distilled = distill(stolen, hard, alpha=0.0, epochs=2)
    retrained = retrain(stolen, hard, answers="labels", epochs=2)
    torch.testing.assert_close(vector(distilled), vector(retrained), atol=1e-5, rtol=1e-4)


def test_a_student_comes_near_the_logits(stolen, thief):
    x, _ = fetch(thief.clean, list(range(200)))

    def divergence(alpha):
        learnt = distill(stolen, thief, alpha=alpha, epochs=6)
        with torch.no_grad():
            ours, theirs = ((model(x) / 3).log_softmax(1) for model in (learnt, stolen))
        return F.kl_div(ours, theirs, reduction="batchmean", log_target=True).item()

    assert divergence(1.0) < 0.8 * divergence(0.0)


def test_adversarial_extraction_makes_robust(stolen, thief):
    x, y = next(iter(thief.in_order(256)))

    def robust(model):
        made = adversarial(model, thief, x, y, radius=0.1, step=0.03, n_steps=6)
        with torch.no_grad():
            return (model(made).argmax(1) == y).float().mean().item()

    settings = {**ADVERSARIAL, "n_images": 400, "epochs": 6}
    assert robust(extract_adversarially(stolen, thief, **settings)) > robust(stolen) + 0.1


# --- ensembles


def test_an_ensemble_answers_with_the_mean_probability():
    ensemble, x = Ensemble(), torch.rand(5, 1, 8, 8)
    ensemble.networks.extend(MLP((1, 8, 8), 10, (16,)) for _ in range(3))
    with torch.no_grad():
        expected = torch.stack([network(x).softmax(1) for network in ensemble.networks]).mean(0)
        torch.testing.assert_close(ensemble(x).exp(), expected)


def test_each_network_of_an_ensemble_sees_its_own_part(stolen, thief, monkeypatch):
    seen, recipes = [], []

    def spy(model, data, recipe, **settings):
        seen.append(torch.cat([x.flatten(1) for x, _ in data.in_order()]))
        recipes.append(recipe)
        return model.eval()

    monkeypatch.setattr("gradsigns_lightning.attacks.ensembles.train", spy)
    sizes = []
    ensemble = extract_ensemble(
        stolen, thief, epochs=7, observe=lambda dose, model: sizes.append(len(model.networks))
    )
    assert sizes == [1, 2, 3]
    assert {(recipe.epochs, recipe.label_smoothing) for recipe in recipes} == {(7, 0.2)}
    everything = torch.cat([x.flatten(1) for x, _ in thief.in_order()])
    assert max(map(len, seen)) - min(map(len, seen)) <= 1
    assert torch.equal(torch.cat(seen).sort(0).values, everything.sort(0).values)
    first, second = (vector(network) for network in ensemble.networks[:2])
    assert not torch.equal(first, second)


# --- transfer to rotations


def test_images_are_rotated():
    x = torch.arange(8.0).view(2, 1, 2, 2)
    turned, turns = rotated(x)
    assert turns.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(turned[:2], x)
    assert turned[2, 0].tolist() == [[1, 3], [0, 2]]
    assert torch.equal(turned[4:6], x.flip(2, 3))


def test_features_learn_rotations_before_the_way_back(stolen, thief, judge):
    halfway = {}

    def keep(dose, model):
        if dose == 4:
            halfway["model"] = copy.deepcopy(model)

    attacked = transfer_to_rotations(stolen, thief, rotation_epochs=4, epochs=4, observe=keep)
    assert torch.equal(halfway["model"].head.weight, stolen.head.weight)
    assert rotations_read(halfway["model"], thief) > rotations_read(stolen, thief) + 0.1
    assert judge.accuracy(attacked) > 0.9
    assert judge.log10_p_value(attacked) > judge.log10_p_value(stolen) + 1


@torch.no_grad()
def rotations_read(model, thief):
    """Return the share of unseen rotations that least squares on the features tell."""
    x, _ = fetch(thief.clean, list(range(300)))
    shares = []
    for part in x.split(150):
        turned, turns = rotated(part)
        features = into(model.head, model, turned)
        shares.append((torch.cat([features, torch.ones(len(features), 1)], 1), turns))
    (inputs, turns), (unseen, expected) = shares
    weight = torch.linalg.lstsq(inputs, F.one_hot(turns, 4).float()).solution
    return ((unseen @ weight).argmax(1) == expected).float().mean().item()


def test_only_square_images_are_turned(stolen):
    images = TensorDataset(torch.zeros(4, 1, 8, 12), torch.zeros(4, dtype=torch.long))
    data = AttackData(images, images, 10, (0.0,), (1.0,))
    with pytest.raises(ValueError, match=r"`data` must have square images.*got \(8, 12\)"):
        transfer_to_rotations(stolen, data, rotation_epochs=1, epochs=1)
