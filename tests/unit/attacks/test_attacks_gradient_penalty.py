import pytest
import torch
from torch import nn

from gradsigns_lightning.attacks import fine_tune, penalize_gradients


def test_the_input_gradients_shrink(thief):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = next(iter(thief.in_order()))

    def gradient_length(model):
        leaf = x.clone().requires_grad_(True)
        loss = nn.functional.cross_entropy(model(leaf), y, reduction="sum", label_smoothing=0.1)
        return torch.autograd.grad(loss, leaf)[0].flatten(1).norm(dim=1).mean().item()

    without, penalized = (penalize_gradients(network, thief, strength=s) for s in (0.0, 5.0))
    assert gradient_length(penalized) < 0.8 * gradient_length(without)


def test_a_strong_penalty_takes_more_of_the_mark_than_fine_tuning(stolen, thief, judge):
    without, penalized = fine_tune(stolen, thief), penalize_gradients(stolen, thief, strength=10.0)
    assert judge.log10_p_value(penalized) > judge.log10_p_value(without) + 2
    assert judge.accuracy(penalized) > judge.accuracy(stolen) - 0.05


def test_a_large_rate_erases_the_mark_and_a_small_one_keeps_it(stolen, thief, judge):
    small, large = (penalize_gradients(stolen, thief, rate_factor=f) for f in (0.1, 3.0))
    assert judge.log10_p_value(small) < -6
    assert judge.log10_p_value(large) > -4


def test_without_strength_it_is_fine_tuning(stolen, thief):
    ours, plain = (
        penalize_gradients(stolen, thief, strength=0.0, epochs=1),
        fine_tune(stolen, thief, epochs=1),
    )
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("setting", [{"strength": -1.0}, {"epochs": 0}, {"rate_factor": -1.0}])
def test_settings_are_checked(stolen, thief, setting):
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` must be"):
        penalize_gradients(stolen, thief, **setting)
