import pytest
import torch

from gradsigns_lightning.attacks import add_weight_noise, shift_weights
from gradsigns_lightning.attacks.recovery import weights_of


def kernels(model):
    return [getattr(module, name).detach() for module, name in weights_of(model)]


def test_noise_is_as_large_as_said_and_grows_along_one_line(stolen, thief):
    seen = {}
    add_weight_noise(
        stolen,
        thief,
        size=0.4,
        step=0.2,
        observe=lambda dose, model: seen.update(
            {dose: [b - a for a, b in zip(kernels(stolen), kernels(model), strict=True)]}
        ),
    )
    assert list(seen) == [0.2, 0.4]
    for before, small, large in zip(kernels(stolen), seen[0.2], seen[0.4], strict=True):
        assert large.std() / before.std() == pytest.approx(0.4, rel=0.25)
        assert torch.allclose(2 * small, large, atol=1e-5)
    other = add_weight_noise(stolen, thief, size=0.4, seed=1)
    assert not torch.equal(kernels(other)[0] - kernels(stolen)[0], seen[0.4][0])


def test_little_noise_keeps_the_mark_and_much_does_not(stolen, thief, judge):
    little, much = (add_weight_noise(stolen, thief, size=size) for size in (0.05, 1.0))
    assert judge.accuracy(little) == pytest.approx(judge.accuracy(stolen), abs=0.03)
    assert judge.log10_p_value(little) < judge.log10_p_value(stolen) + 1.5
    assert judge.log10_p_value(much) > -2


def test_a_shift_takes_the_mean_filter_off(stolen, thief):
    moved = kernels(shift_weights(stolen, thief, shift=1.0, noise=0.0, epochs=0))
    assert all(kernel.mean(0).abs().max() < 1e-6 for kernel in moved[:-1])
    assert torch.equal(moved[-1], stolen.head.weight)
    noisy = kernels(shift_weights(stolen, thief, shift=0.0, noise=0.5, epochs=0))
    ratios = [(b - a).std() / a.std() for a, b in zip(kernels(stolen), noisy, strict=True)]
    assert ratios[:-1] == pytest.approx([0.5] * 9, rel=0.2)
    assert ratios[-1] == 0


def test_weight_shifting_erases_the_mark_and_keeps_the_accuracy(stolen, thief, judge):
    accuracies = {}
    attacked = shift_weights(
        stolen, thief, epochs=6, observe=lambda dose, model: accuracies.update({dose: judge.accuracy(model)})
    )
    assert list(accuracies) == list(range(7))
    assert accuracies[0] < 0.5
    assert accuracies[6] > 0.85
    assert judge.log10_p_value(attacked) > -2.5


@pytest.mark.parametrize(
    ("attack", "setting"),
    [
        (add_weight_noise, {"size": -1}),
        (add_weight_noise, {"step": 0}),
        (shift_weights, {"shift": float("nan")}),
        (shift_weights, {"noise": -1}),
        (shift_weights, {"epochs": -1}),
    ],
)
def test_settings_are_checked(stolen, thief, attack, setting):
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` must be"):
        attack(stolen, thief, **setting)
