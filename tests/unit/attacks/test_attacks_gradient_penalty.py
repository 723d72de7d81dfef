import pytest
import torch
from torch import nn

from gradsigns_lightning.attacks import fine_tune, penalize_gradients


def gradient_length(model, thief):
    x, y = next(iter(thief.in_order()))
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    return gradient.flatten(1).norm(dim=1).mean().item()


def test_the_input_gradients_shrink(stolen, thief, judge):
    without, penalized = fine_tune(stolen, thief), penalize_gradients(stolen, thief, strength=5.0)
    assert gradient_length(penalized, thief) < 0.8 * gradient_length(without, thief)
    assert judge.accuracy(penalized) > 0.9


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
