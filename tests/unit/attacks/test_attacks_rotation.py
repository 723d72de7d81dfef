import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from gradsigns_lightning.attacks import (
    Chain,
    DefensiveDistillation,
    FineTuning,
    Flushing,
    GradientPenalty,
    Overwriting,
    Rotation,
    Saturation,
    Shattering,
    SuspectRotation,
    rotate,
)
from gradsigns_lightning.attacks.class_gradients import (
    ClassImages,
    View,
    directions,
    mean_direction,
    views_of,
)
from gradsigns_lightning.models import ViT

SHORT = {"epochs": 1, "rate_factor": 0.3}
ADAPTIVE = [
    Rotation(target_class=3, **SHORT),
    Rotation("classes", n_views=2, **SHORT),
    Rotation("pairs", n_views=2, **SHORT),
    Rotation("mixtures", n_views=2, **SHORT),
    SuspectRotation(**SHORT),
    Overwriting(target_class=3, **SHORT),
    Overwriting("all", **SHORT),
    Flushing(target_class=3, unlearning_epochs=1, **SHORT),
    GradientPenalty(**SHORT),
    Saturation(),
    DefensiveDistillation(**SHORT),
    Shattering(),
    Chain((FineTuning(epochs=1, rate_factor=0.1), Saturation())),
]


@pytest.mark.parametrize("attack", ADAPTIVE, ids=lambda attack: type(attack).__name__)
def test_the_stolen_model_and_the_random_states_stay(stolen, armed, judge, attack):
    stolen.train()
    stolen.head.eval()
    before, flags = copy.deepcopy(stolen.state_dict()), [m.training for m in stolen.modules()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    doses = []
    attacked = attack(stolen, armed, observe=lambda dose, model: doses.append(dose))
    assert all(torch.equal(before[name], value) for name, value in stolen.state_dict().items())
    assert flags == [m.training for m in stolen.modules()]
    assert all(p.grad is None for p in stolen.parameters())
    assert torch.equal(state[0], torch.get_rng_state())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]
    assert not any(m.training for m in attacked.modules())
    assert doses
    assert doses == sorted(set(doses))
    assert judge.accuracy(attacked) > 0.9


def test_one_class_turned_takes_the_mark_and_not_the_accuracy(stolen, thief, judge):
    settings = {"target_class": 3, "rate_factor": 0.3}
    fine_tuned, turned = (rotate(stolen, thief, strength=s, **settings) for s in (0.0, 3.0))
    assert judge.log10_p_value(fine_tuned) < -7
    assert judge.log10_p_value(turned) > -2
    assert judge.accuracy(turned) > judge.accuracy(stolen) - 0.02
    images, view = ClassImages(thief), View(3, 3)
    origin, left, kept = (
        mean_direction(model, images, view, thief) for model in (stolen, turned, fine_tuned)
    )
    assert torch.cosine_similarity(origin, kept, dim=0) > 0.8
    assert torch.cosine_similarity(origin, left, dim=0) < 0.4


def test_all_classes_turned_take_a_mark_whose_class_is_not_known(stolen, thief, judge):
    turned = rotate(stolen, thief, target="classes", n_images=16)
    assert judge.log10_p_value(turned) > -2
    assert judge.accuracy(turned) > judge.accuracy(stolen) - 0.05


def test_another_class_turned_leaves_the_mark(stolen, thief, judge):
    assert judge.log10_p_value(rotate(stolen, thief, target_class=8, rate_factor=0.3)) < -6


def test_what_a_twin_has_of_the_gradient_may_stay(stolen, thief, judge):
    turned = rotate(stolen, replace(thief, recipe=replace(thief.recipe, epochs=4)), target_class=3, twin=True)
    assert judge.log10_p_value(turned) > -2
    assert judge.accuracy(turned) > judge.accuracy(stolen) - 0.05


@pytest.mark.parametrize("kind", ["mlp", "vit"])
def test_networks_without_batch_norm_are_turned_too(thief, kind):
    torch.manual_seed(0)
    network = (
        nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        if kind == "mlp"
        else ViT((1, 8, 8), 10, patch_size=4, dim=8, depth=1, heads=2)
    )
    settings = {"target": "classes", "every_n_steps": 1, "n_views": 5, "epochs": 3}
    without, turned = (rotate(network, thief, strength=s, **settings) for s in (0.0, 3.0))
    images = ClassImages(thief)

    def cosine(model, view):
        return torch.cosine_similarity(
            *(mean_direction(m, images, view, thief) for m in (model, network)), dim=0
        )

    views = views_of("classes", 0, 10)
    kept, left = (sum(cosine(model, view).abs() for view in views) for model in (without, turned))
    assert left < 0.8 * kept


def test_directions_are_those_of_the_loss_also_where_its_gradient_underflows(stolen, thief):
    inputs = ClassImages(thief).of(3, 8).double()
    network = stolen.double()
    leaf = inputs.clone().requires_grad_(True)
    loss = nn.functional.cross_entropy(network(leaf), torch.full((8,), 3), reduction="sum")
    by_loss = torch.autograd.grad(loss, leaf)[0].flatten(1)
    found = directions(network, inputs, View(3, 3), thief)
    assert torch.allclose(found, nn.functional.normalize(by_loss, dim=1), atol=1e-9)
    single = Saturation()(stolen.float(), thief)
    assert torch.allclose(
        directions(single, inputs.float(), View(3, 3), thief).norm(dim=1), torch.ones(8), atol=1e-5
    )


@pytest.mark.parametrize(("target", "n"), [("class", 1), ("classes", 4), ("pairs", 16), ("mixtures", 16)])
def test_views(target, n):
    views = views_of(target, 1, 4)
    assert len(views) == n
    assert {view.images for view in views} == ({1} if target == "class" else {0, 1, 2, 3})


def test_images_of_a_class_are_of_it(thief):
    labels = torch.cat([y for _, y in thief.in_order()])
    inputs = torch.cat([x for x, _ in thief.in_order()])
    found = ClassImages(thief).of(5, 1000)
    assert len(found) == (labels == 5).sum()
    assert torch.allclose(found.sum(0), inputs[labels == 5].sum(0), atol=1e-4)


@pytest.mark.parametrize(
    "setting",
    [
        {"target": "all"},
        {"target_class": 10},
        {"strength": -1.0},
        {"every_n_steps": 0},
        {"n_views": 0},
        {"n_images": 0},
        {"rate_factor": -1.0},
    ],
)
def test_settings_are_checked(stolen, thief, setting):
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` must be"):
        rotate(stolen, thief, **setting)


def test_a_class_without_images_is_refused(stolen, thief):
    labels = torch.cat([y for _, y in thief.in_order()])
    with pytest.raises(ValueError, match="`data` must have images of class 3"):
        rotate(stolen, thief.relabelled(labels.where(labels != 3, 4)), target_class=3)
