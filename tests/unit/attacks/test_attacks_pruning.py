import pytest
import torch
from torch import nn

from gradsigns_lightning.attacks import fine_prune, prune, prune_channels
from gradsigns_lightning.attacks.base import last_layer
from gradsigns_lightning.attacks.recovery import weights_of


def zeros(model):
    """Return the share of zeros in each weight."""
    return [(getattr(module, name) == 0).float().mean().item() for module, name in weights_of(model)]


def n_weights(model):
    return sum(parameter.numel() for parameter in model.parameters())


def share_of_zeros(model):
    weights = torch.cat([getattr(module, name).flatten() for module, name in weights_of(model)])
    return (weights == 0).float().mean().item()


@pytest.mark.parametrize("epochs", [0, 1])
def test_half_of_each_layer_is_pruned_and_stays_pruned(stolen, thief, epochs):
    attacked = prune(stolen, thief, share=0.5, epochs=epochs)
    assert zeros(attacked) == pytest.approx([0.5] * 10, abs=0.01)
    assert list(attacked.state_dict()) == list(stolen.state_dict())
    if epochs == 0:
        assert torch.equal(attacked.head.bias, stolen.head.bias)
        kept, before = attacked.head.weight, stolen.head.weight
        assert before[kept == 0].abs().max() <= before[kept != 0].abs().min()
        assert torch.equal(kept[kept != 0], before[kept != 0])


def test_pruning_by_all_weights_spares_layers_with_large_ones(stolen, thief):
    with torch.no_grad():
        stolen.head.weight.mul_(100)
    attacked = prune(stolen, thief, share=0.9, scope="global")
    assert share_of_zeros(attacked) == pytest.approx(0.9, abs=1e-4)
    assert zeros(attacked)[-1] < 0.05


def test_a_little_pruning_keeps_the_mark_and_much_of_it_erases_it(stolen, thief, judge):
    seen = {}
    prune(
        stolen,
        thief,
        share=0.6,
        scope="global",
        step=0.2,
        observe=lambda dose, model: seen.update({dose: (share_of_zeros(model), judge.accuracy(model))}),
    )
    assert list(seen) == pytest.approx([share for share, _ in seen.values()], abs=1e-3)
    assert seen[0.2][1] == pytest.approx(judge.accuracy(stolen), abs=0.02)
    little = prune(stolen, thief, share=0.1, scope="global")
    assert judge.log10_p_value(little) < judge.log10_p_value(stolen) + 1
    much = prune(stolen, thief, share=0.9, scope="global", epochs=4)
    assert judge.log10_p_value(much) > -2
    assert judge.accuracy(much) > 0.75


def test_without_an_observer_the_same_is_returned(stolen, thief):
    settings = {"share": 0.4, "step": 0.2, "epochs": 1}
    watched, alone = (prune(stolen, thief, observe=o, **settings) for o in (lambda dose, model: None, None))
    assert all(torch.equal(watched.state_dict()[k], v) for k, v in alone.state_dict().items())


def test_channels_go_with_all_that_depends_on_them(stolen, thief, judge):
    attacked = prune_channels(stolen, thief, share=0.5, epochs=0)
    assert n_weights(attacked) < 0.3 * n_weights(stolen)
    assert last_layer(attacked).out_features == 10
    assert attacked.blocks[0].residual[1].num_features == 8
    trained = prune_channels(stolen, thief, share=0.5, epochs=5)
    assert n_weights(trained) == n_weights(attacked)
    assert judge.accuracy(attacked) < 0.6 < 0.85 < judge.accuracy(trained)
    assert judge.log10_p_value(trained) > -3


def test_group_normalization_is_pruned_too(thief):
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )  # fmt: skip
    attacked = prune_channels(network, thief, share=0.5, epochs=0)
    assert (attacked[0].out_channels, attacked[1].num_channels, attacked[5].in_features) == (8, 8, 8 * 16)


def test_fine_pruning_silences_what_is_least_active(stolen, thief, judge):
    attacked = fine_prune(stolen, thief, share=0.96, epochs=0)
    silent = (attacked.head.weight == 0).all(0)
    assert silent.sum() == int(0.96 * 64)
    with torch.no_grad():
        x = torch.cat([x for x, _ in thief.in_order()])
        activity = stolen.blocks(stolen.stem(x)).mean(dim=(0, 2, 3))
    assert activity[silent].max() <= activity[~silent].min()
    trained = fine_prune(stolen, thief, share=0.8, epochs=5)
    assert (trained.head.weight == 0).all(0).sum() == int(0.8 * 64)
    assert judge.accuracy(trained) > 0.9
    assert judge.verify(trained).margin < judge.verify(stolen).margin - 0.3


@pytest.mark.parametrize(
    ("attack", "setting"),
    [
        (prune, {"share": 1.1}),
        (prune, {"scope": "some"}),
        (prune, {"step": 0}),
        (prune, {"epochs": -1}),
        (prune, {"labels": "some"}),
        (prune, {"rate_factor": -1}),
        (prune_channels, {"share": 1}),
        (prune_channels, {"step": 2}),
        (fine_prune, {"share": -0.1}),
    ],
)
def test_settings_are_checked(stolen, thief, attack, setting):
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` must be"):
        attack(stolen, thief, **setting)
