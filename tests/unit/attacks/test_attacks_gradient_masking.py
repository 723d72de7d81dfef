import copy

import pytest
import torch
from torch import nn

from gradsigns_lightning.attacks import distill_defensively, saturate, shatter
from gradsigns_lightning.attacks.base import predictions
from gradsigns_lightning.attacks.class_gradients import ClassImages, View, mean_direction


def gradients(model, thief):
    """Return the input gradients of the loss itself, which are not those of the log-odds."""
    x, y = next(iter(thief.in_order()))
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    return gradient.flatten(1)


def test_a_saturated_softmax_has_no_gradient_but_log_odds_do(stolen, thief, judge):
    doses = []
    attacked = saturate(stolen, thief, observe=lambda dose, model: doses.append(dose))
    assert doses == [1, 10, 100, 1000]
    assert torch.equal(predictions(attacked, thief).argmax(1), predictions(stolen, thief).argmax(1))
    assert judge.accuracy(attacked) == judge.accuracy(stolen)
    lost = [(gradients(model, thief) == 0).all(1).float().mean() for model in (stolen, attacked)]
    assert lost[0] == 0
    assert lost[1] > 0.95
    images = ClassImages(thief)
    before, after = (mean_direction(model, images, View(3, 3), thief) for model in (stolen, attacked))
    assert torch.cosine_similarity(before, after, dim=0) > 0.95


def test_logits_that_no_linear_layer_makes_are_refused(stolen, thief):
    with pytest.raises(ValueError, match="`model` must return what its last linear layer makes"):
        saturate(nn.Sequential(copy.deepcopy(stolen), nn.LogSoftmax(dim=1)), thief)
    with pytest.raises(ValueError, match="`model` must have a linear layer"):
        saturate(nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), thief)


def test_distillation_at_a_temperature_shrinks_gradients(stolen, thief, judge):
    attacked = distill_defensively(stolen, thief)
    assert judge.accuracy(attacked) > judge.accuracy(stolen) - 0.03
    lengths = [gradients(model, thief).norm(dim=1).median() for model in (stolen, attacked)]
    assert lengths[1] < 0.01 * lengths[0]


def test_rounding_takes_every_gradient_and_changes_no_answer_for_images(stolen, thief, judge):
    attacked = shatter(stolen, thief)
    assert torch.allclose(predictions(attacked, thief), predictions(stolen, thief), atol=0.5)
    assert judge.accuracy(attacked) == judge.accuracy(stolen)
    assert judge.verify(attacked).verdict == "inconclusive"
    assert judge.verify(attacked).n_erasures == 32
    assert judge.accuracy(shatter(stolen, thief, bits=1)) < judge.accuracy(stolen)


@pytest.mark.parametrize(
    ("attack", "setting"),
    [
        (saturate, {"factor": 0.5}),
        (distill_defensively, {"temperature": 0.5}),
        (distill_defensively, {"epochs": 0}),
        (shatter, {"bits": 0}),
    ],
)
def test_settings_are_checked(stolen, thief, attack, setting):
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` must be"):
        attack(stolen, thief, **setting)
