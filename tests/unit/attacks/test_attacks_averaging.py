from dataclasses import replace

import pytest
import torch

from gradsigns_lightning.attacks import average_checkpoints, connect_modes, fine_tune
from gradsigns_lightning.attacks.averaging import BezierCurve
from gradsigns_lightning.attacks.base import copied
from gradsigns_lightning.attacks.recovery import accuracy
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.models import MLP


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_average_is_that_of_the_epochs(stolen, thief):
    constant = replace(thief, recipe=replace(thief.recipe, schedule="constant"))
    epochs = []
    fine_tune(stolen, constant, epochs=3, observe=lambda dose, model: epochs.append(weights(model).clone()))
    attacked = average_checkpoints(stolen, thief, epochs=3)
    assert torch.allclose(weights(attacked), torch.stack(epochs).mean(0), atol=1e-5)
    assert not torch.allclose(weights(attacked), epochs[-1], atol=1e-3)


def test_statistics_fit_the_average(stolen, thief):
    attacked = average_checkpoints(stolen, thief, epochs=1)
    with torch.no_grad():
        x = torch.cat([x for x, _ in thief.batches(seed=0)])
        activation = attacked.stem[0](x)
    norm = attacked.stem[1]
    assert torch.allclose(norm.running_mean, activation.mean(dim=(0, 2, 3)), atol=0.02)


def test_averaging_wears_the_mark_and_keeps_the_accuracy(stolen, thief, judge):
    seen = {}
    average_checkpoints(
        stolen,
        thief,
        observe=lambda dose, model: seen.update({dose: (judge.accuracy(model), judge.log10_p_value(model))}),
    )
    assert list(seen) == [1, 2, 3, 4, 5]
    assert seen[5][0] > 0.93
    assert seen[5][1] > seen[1][1]


def test_a_curve_joins_its_ends(stolen, unmarked, thief):
    curve = BezierCurve(copied(stolen), unmarked)
    assert torch.allclose(weights(curve.at(0.0)), weights(stolen))
    assert torch.allclose(weights(curve.at(1.0)), weights(unmarked))
    assert torch.allclose(weights(curve.at(0.5)), (weights(stolen) + weights(unmarked)) / 2, atol=1e-6)
    with torch.no_grad():
        for bend in curve.bend:
            bend.zero_()
    assert torch.allclose(weights(curve.at(0.5)), (weights(stolen) + weights(unmarked)) / 4, atol=1e-6)


def test_the_bend_is_trained_where_the_straight_line_fails(thief):
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = MLP((1, 8, 8), 10, (16, 16))
        ends.append(train(network, thief, replace(thief.recipe, rate=1e-2, epochs=8)))
    curve = BezierCurve(*ends)
    before = [accuracy(curve.at(t), thief) for t in (0.0, 0.5, 1.0)]
    assert before[1] < min(before[0], before[2]) - 0.1
    train(curve, thief, replace(thief.recipe, rate=1e-2, epochs=16), parameters=curve.bend.parameters())
    after = [accuracy(curve.at(t), thief) for t in (0.0, 0.5, 1.0)]
    assert after[1] > before[1] + 0.1
    assert (before[0], before[2]) == (after[0], after[2])


def test_points_further_away_show_less_of_the_mark(stolen, thief, judge):
    seen = {}
    connect_modes(
        stolen,
        thief,
        position=0.5,
        curve_epochs=4,
        observe=lambda dose, model: seen.update({dose: (judge.accuracy(model), judge.log10_p_value(model))}),
    )
    assert list(seen) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert min(right for right, _ in seen.values()) > 0.93
    assert seen[0.5][1] > judge.log10_p_value(stolen) + 1


@pytest.mark.parametrize(
    ("attack", "setting"),
    [
        (average_checkpoints, {"epochs": 0}),
        (average_checkpoints, {"labels": "some"}),
        (connect_modes, {"position": 1.5}),
        (connect_modes, {"curve_epochs": 0}),
        (connect_modes, {"n_images": 0, "end_epochs": 1}),
    ],
)
def test_settings_are_checked(stolen, thief, attack, setting):
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` must be"):
        attack(stolen, thief, **setting)
