"""Repairs: each forgets a planted backdoor, or does to a network what its paper says."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradsigns_lightning.attacks import (
    distill_attention,
    launder,
    prune_trigger,
    reshape_boundaries,
    train_adversarially,
    unlearn_adversarially,
    unlearn_trigger,
)
from gradsigns_lightning.attacks.base import copied, fetch
from gradsigns_lightning.attacks.cleansing import Trigger, find_trigger, rises
from gradsigns_lightning.attacks.repair import adversarial, attention, ends_of_resolutions
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.attacks.unlearning import hypergradient, moved_to_others, shared_perturbation
from gradsigns_lightning.models import MLP, ViT

SEARCH = {"search_steps": 20, "refine_steps": 40}
SHORT = {
    train_adversarially: {"radii": (0.1,), "n_steps": 3, "n_images": 50, "step": 0.05, "epochs": 1},
    distill_attention: {"teacher_epochs": 1, "epochs": 1},
    unlearn_adversarially: {"rounds": 1, "fixed_points": 2},
    reshape_boundaries: {"epochs": 1, "tuning_epochs": 1},
    unlearn_trigger: {"search_steps": 2, "refine_steps": 2, "epochs": 1},
    prune_trigger: {"search_steps": 2, "refine_steps": 2},
    launder: {"search_steps": 2, "refine_steps": 2, "epochs": 2},
}


@pytest.fixture(scope="module")
def corner(thief):
    """Return the trigger of a backdoor to class 0: four white pixels in a corner."""
    mask = torch.zeros(1, 8, 8)
    mask[:, :2, :2] = 1
    return Trigger(mask, torch.ones(1, 8, 8), 0)


@pytest.fixture(scope="module")
def backdoored(trained, thief, corner):
    def loss(model, x, y):
        part = x[: len(x) // 4]
        targets = torch.cat([y, torch.zeros(len(part), dtype=y.dtype)])
        return F.cross_entropy(model(torch.cat([x, corner.stamped(thief, part)])), targets)

    return train(copied(trained["unmarked"]), thief, thief.recipe.scaled(4, 0.3), loss=loss)


@pytest.fixture(scope="module")
def success(digits, thief, corner):
    """Return the share of test images of other classes that the trigger turns."""
    labels = digits._source("test").labels
    x = corner.stamped(thief, thief.normalized(digits.raw_images("test")[labels != 0]))

    @torch.no_grad()
    def measured(model):
        return (model.eval()(x).argmax(1) == 0).float().mean().item()

    return measured


def weights(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


@pytest.mark.parametrize("attack", SHORT, ids=lambda attack: attack.__name__)
def test_a_copy_is_attacked_and_all_else_stays(attack, stolen, thief, judge):
    before, flags = copy.deepcopy(stolen.state_dict()), [m.training for m in stolen.modules()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    doses = []
    attacked = attack(stolen, thief, observe=lambda dose, model: doses.append(dose), **SHORT[attack])
    assert all(torch.equal(before[name], value) for name, value in stolen.state_dict().items())
    assert flags == [m.training for m in stolen.modules()]
    assert torch.equal(state[0], torch.get_rng_state())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]
    assert not any(m.training for m in attacked.modules())
    assert not torch.equal(weights(attacked), weights(stolen))
    assert judge.accuracy(attacked) > 0.85
    assert doses == sorted(set(doses))
    assert doses
    assert torch.equal(weights(attack(stolen, thief, **SHORT[attack])), weights(attacked))


@pytest.mark.parametrize(
    "network", [MLP((1, 8, 8), 10, (16,)), ViT((1, 8, 8), 10, patch_size=4, dim=8, heads=2)]
)
@pytest.mark.parametrize(
    "attack",
    [attack for attack in SHORT if attack is not distill_attention],
    ids=lambda attack: attack.__name__,
)
def test_networks_without_convolutions_and_batch_norm_are_attacked(attack, network, thief):
    attacked = attack(network, thief.part(torch.arange(64)), **SHORT[attack])
    assert weights(attacked).isfinite().all()
    assert not torch.equal(weights(attacked), weights(network))


@pytest.mark.parametrize(
    ("attack", "setting"),
    [
        (train_adversarially, {"radii": (0.1, -0.1)}),
        (train_adversarially, {"n_steps": 0}),
        (train_adversarially, {"n_images": 0}),
        (train_adversarially, {"labels": "none"}),
        (distill_attention, {"betas": (-1.0,)}),
        (unlearn_adversarially, {"rounds": 0}),
        (unlearn_adversarially, {"fixed_points": 0}),
        (reshape_boundaries, {"radius": -1.0}),
        (reshape_boundaries, {"share": 2.0}),
        (unlearn_trigger, {"share": 1.5}),
        (prune_trigger, {"ratio": 1.5}),
        (prune_trigger, {"search_steps": 0}),
        (launder, {"conv_threshold": -1.0}),
        (launder, {"penalty": -1.0}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_settings_are_checked(attack, setting, stolen, thief):
    settings = {**SHORT[attack], **setting}
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` must be"):
        attack(stolen, thief, **settings)


def test_the_backdoor_is_there(backdoored, unmarked, success, judge):
    assert success(backdoored) > 0.95
    assert success(unmarked) < 0.3
    assert judge.accuracy(backdoored) > 0.95


@pytest.mark.parametrize(
    ("attack", "settings", "left"),
    [
        (unlearn_trigger, {**SEARCH, "epochs": 3}, 0.1),
        (prune_trigger, {**SEARCH, "ratio": 0.3}, 0.6),
        (launder, {**SEARCH, "epochs": 3}, 0.1),
        (distill_attention, {"rate_factor": 3.0, "teacher_epochs": 3, "epochs": 3}, 0.5),
        (unlearn_adversarially, {"rounds": 4, "fixed_points": 1, "rate_factor": 1.0}, 0.9),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_backdoor_is_forgotten(attack, settings, left, backdoored, thief, success, judge):
    repaired = attack(backdoored, thief, **settings)
    assert success(repaired) < left
    assert judge.accuracy(repaired) > 0.85


def test_the_trigger_is_found(backdoored, thief, corner):
    labels = torch.cat([y for _, y in thief.in_order()])
    torch.manual_seed(0)
    found = find_trigger(backdoored, thief, labels, 0, penalty=0.01, n_steps=100)
    other = find_trigger(backdoored, thief, labels, 1, penalty=0.01, n_steps=100)
    assert found.size < other.size
    inside = (found.mask * corner.mask).sum() / found.mask.sum()
    assert inside > 0.3  # of 4 pixels among 64


def test_the_features_that_a_trigger_raises_are_cut(backdoored, thief):
    shares = []
    pruned = prune_trigger(
        backdoored,
        thief,
        search_steps=2,
        refine_steps=2,
        ratio=0.25,
        observe=lambda dose, model: shares.append((dose, (model.head.weight == 0).all(0).sum().item())),
    )
    assert shares == [(0.0, 0), (0.125, 8), (0.25, 16)]
    kept = pruned.head.weight != 0
    assert torch.equal(pruned.head.weight[kept], backdoored.head.weight[kept])


def test_a_rise_is_in_standard_deviations(thief):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(3 * 64, 10))
    x = torch.cat([x for x, _ in thief.in_order()])
    with torch.no_grad():
        raised = x.clone()
        raised[:, :, 2, 5] += 3.0
        by_layer = list(rises(model, x, raised))
        slope = model[0].weight.flatten()
        expected = (3 * slope).clamp_min(0) / model[0](x).std((0, 2, 3))
    assert [layer for layer, _ in by_layer] == [model[0], model[2]]
    assert torch.allclose(by_layer[0][1], expected, atol=1e-4)
    assert by_layer[1][1].shape == (10,)


def test_channels_that_the_trigger_raises_are_reset(backdoored, thief, monkeypatch):
    reset = []
    monkeypatch.setattr(
        "gradsigns_lightning.attacks.cleansing.retrained",
        lambda attacked, *rest: reset.append(attacked) or attacked,
    )
    for threshold in (0.5, 1e9):
        launder(backdoored, thief, conv_threshold=threshold, search_steps=5, refine_steps=5)
    some, none = (
        sum((m.weight.flatten(1) == 0).all(1).sum().item() for m in model.modules() if hasattr(m, "groups"))
        for model in reset
    )
    assert some > 0
    assert none == 0


def test_adversarial_images_are_near_and_wrong(stolen, thief):
    x, y = next(iter(thief.in_order(128)))
    stolen.train()
    made = adversarial(stolen, thief, x, y, radius=0.2, step=0.05, n_steps=8)
    assert all(m.training for m in stolen.modules())
    changed = (thief.raw(made) - thief.raw(x)).abs()
    assert changed.max() <= 0.2 + 1e-5
    assert thief.raw(made).min() >= -1e-6
    assert thief.raw(made).max() <= 1 + 1e-6
    stolen.eval()
    right = [(stolen(images).argmax(1) == y).float().mean().item() for images in (x, made)]
    assert right[1] < 0.5 < 0.9 < right[0]


def test_adversarial_training_makes_robust(stolen, thief):
    x, y = next(iter(thief.in_order(256)))

    def robust(model):
        made = adversarial(model, thief, x, y, radius=0.1, step=0.03, n_steps=6)
        return (model(made).argmax(1) == y).float().mean().item()

    attacked = train_adversarially(
        stolen, thief, radii=(0.1,), step=0.03, n_steps=6, n_images=300, epochs=2, labels="true"
    )
    assert robust(attacked) > robust(stolen) + 0.1


def test_the_student_looks_where_the_teacher_looks(stolen, thief):
    x, _ = fetch(thief.clean, list(range(200)))
    names = ends_of_resolutions(stolen, x[:1])
    assert names == ["blocks.0", "blocks.1"]  # the third has one position

    def gap(beta):
        student = distill_attention(stolen, thief, betas=(beta,), teacher_epochs=1, epochs=2, rate_factor=1.0)
        teacher = distill_attention(stolen, thief, betas=(0.0,), teacher_epochs=1, epochs=1)
        with torch.no_grad():
            ours, theirs = (attention(model, names[-1:], x)[1][0] for model in (student, teacher))
        return F.mse_loss(ours, theirs).item()

    assert gap(1000.0) < 0.7 * gap(0.0)


def test_attention_needs_feature_maps(thief):
    with pytest.raises(ValueError, match="`model` must have feature maps"):
        distill_attention(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), thief)


def test_hypergradients_follow_the_minimum():
    """Inner: (d - Aw)^2 / 2, so that d = Aw at the minimum; outer: b.d + |w|^2 / 2."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 3), torch.randn(4)
    w = nn.Parameter(torch.randn(3))
    change = (a @ w).detach()
    gradients = hypergradient(
        [w],
        change,
        lambda d: (d - a @ w).square().sum() / 2,
        lambda d: (b * d).sum() + w.square().sum() / 2,
        200,
    )
    assert torch.allclose(gradients[0], w + a.T @ b, atol=1e-4)


def test_the_shared_perturbation_is_unlearnt(stolen, thief):
    batch = next(iter(thief.in_order(256)))

    def found(model):
        def penalized(x, y, d):
            return 1e-3 * d.square().sum() - F.cross_entropy(model(thief.normalized(thief.raw(x) + d)), y)

        return shared_perturbation(model, thief, penalized, seed=0)

    @torch.no_grad()
    def loss(model, change):
        return F.cross_entropy(model(thief.normalized(thief.raw(batch[0]) + change)), batch[1]).item()

    change = found(stolen)
    assert change.shape == (1, 1, 8, 8)
    assert loss(stolen, change) > 5 * loss(stolen, 0 * change)
    repaired = unlearn_adversarially(stolen, thief, rounds=2, fixed_points=2, rate_factor=1.0)
    assert loss(repaired, change) < 0.7 * loss(stolen, change)


def test_images_move_towards_others_and_are_learnt_with_wrong_labels(stolen, thief):
    torch.manual_seed(0)
    x, wrong = moved_to_others(stolen, thief, 100, 0.15)
    torch.manual_seed(0)
    order = torch.randperm(thief.n_images)[:100]
    before, y = fetch(thief.clean, order.tolist())
    towards = torch.randint(10, (100,))
    changed = (thief.raw(x) - thief.raw(before)).abs()
    assert changed.max() <= 0.15 + 1e-5
    assert (wrong != y).all()
    assert set(wrong.tolist()) == set(range(10))
    with torch.no_grad():
        nearer = stolen(x).gather(1, towards[:, None]) - stolen(before).gather(1, towards[:, None])
    assert (nearer > 0).float().mean() > 0.9
    attacked = reshape_boundaries(stolen, thief, epochs=2, tuning_epochs=1, rate_factor=1.0)
    with torch.no_grad():
        losses = [F.cross_entropy(model(x), wrong).item() for model in (stolen, attacked)]
    assert losses[1] < losses[0] - 0.5
