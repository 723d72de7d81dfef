from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradsigns_lightning.attacks import prune_adversarially, prune_lipschitz, prune_reconstructively
from gradsigns_lightning.attacks.base import copied
from gradsigns_lightning.attacks.neuron_masks import NeuronMasks, prune_neurons
from gradsigns_lightning.attacks.recovery import accuracy
from gradsigns_lightning.attacks.training import train


def with_trigger(x):
    """Return images with two bright corners."""
    x = x.clone()
    x[:, :, :2, :2] = x[:, :, 6:, 6:] = x.amax()
    return x


def obedience(model, data):
    """Return the share of images of other classes that the trigger turns into class 3."""
    x, y = next(iter(data.in_order()))
    with torch.no_grad():
        return (model(with_trigger(x[y != 3])).argmax(1) == 3).float().mean().item()


@pytest.fixture(scope="module")
def backdoored(trained, thief):
    def loss(model, x, y):
        n = max(1, len(x) // 5)
        poisoned = torch.cat([x, with_trigger(x[:n])]), torch.cat([y, torch.full((n,), 3)])
        return F.cross_entropy(model(poisoned[0]), poisoned[1])

    return train(copied(trained["unmarked"]), thief, replace(thief.recipe, epochs=4), loss=loss)


def silent(model):
    """Return for each normalization which channels have the scale 0."""
    return [m.weight == 0 for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def n_silent(model):
    return sum(int(channels.sum()) for channels in silent(model))


def test_masks_scale_neurons(stolen, thief):
    masked = NeuronMasks(stolen).eval()
    x = torch.stack([thief.clean[i][0] for i in range(8)])
    with torch.no_grad():
        assert torch.equal(masked(x), stolen(x))
        noise = [torch.zeros_like(mask) for mask in (*masked.masks, *masked.masks)]
        noise[-1] += 1.0
        stolen.blocks[2].shortcut[1].bias.mul_(2)
        assert torch.allclose(masked(x, noise), stolen(x), atol=1e-5)
        stolen.blocks[2].shortcut[1].bias.div_(2)
        for mask, norm in zip(
            masked.masks, [m for m in stolen.modules() if isinstance(m, nn.BatchNorm2d)], strict=True
        ):
            mask.fill_(0.5)
            norm.weight.mul_(0.5)
        assert torch.allclose(masked(x), stolen(x), atol=1e-5)
        masked.masks[0].fill_(1.5)
    masked.clamp()
    assert (masked.masks[0] == 1).all()
    assert [name for name, p in masked.named_parameters() if p.requires_grad] == [
        f"masks.{i}" for i in range(len(masked.masks))
    ]


def test_neurons_go_in_the_order_of_their_masks_while_the_accuracy_holds(stolen, thief):
    masks = [torch.ones(len(channels)) for channels in silent(stolen)]
    masks[0][3], masks[1][5], masks[2][:] = 0.1, 0.2, 0.5
    seen = {}
    attacked = prune_neurons(
        stolen,
        thief,
        masks,
        threshold=0.6,
        tolerance=0.05,
        observe=lambda dose, model: seen.update({dose: (n_silent(model), accuracy(model, thief))}),
    )
    n = sum(map(len, masks))
    assert [round(dose * n) for dose in seen] == [count for count, _ in seen.values()]
    assert n_silent(attacked) == 0 or accuracy(attacked, thief) >= accuracy(stolen, thief) - 0.05
    all_of_them = prune_neurons(stolen, thief, masks, threshold=0.6, tolerance=1.0, observe=None)
    assert [channels.sum() for channels in silent(all_of_them)][:4] == [1, 1, 16, 0]
    some = prune_neurons(stolen, thief, masks, threshold=0.3, tolerance=1.0, observe=None)
    assert silent(some)[0].nonzero().tolist() == [[3]]
    assert (silent(some)[1].nonzero().tolist(), n_silent(some)) == ([[5]], 2)


def test_adversarial_pruning_weakens_a_backdoor(backdoored, thief):
    assert obedience(backdoored, thief) > 0.95
    attacked = prune_adversarially(backdoored, thief, n_steps=40)
    assert n_silent(attacked) > 0
    assert accuracy(attacked, thief) >= accuracy(backdoored, thief) - 0.03
    assert obedience(attacked, thief) < 0.7


def test_reconstructive_pruning_finds_what_unlearning_lost(stolen, thief):
    with torch.no_grad():
        stolen.stem[1].weight[0] = 0  # a channel that nobody needs keeps its mask
    seen = []
    attacked = prune_reconstructively(
        stolen, thief, recover_epochs=10, tolerance=0.1, observe=lambda dose, model: seen.append(dose)
    )
    assert seen[0] == 0
    assert len(seen) > 1
    assert n_silent(attacked) > 1
    assert accuracy(attacked, thief) >= accuracy(stolen, thief) - 0.1


@pytest.mark.parametrize("attack", [prune_adversarially, prune_reconstructively])
def test_without_tolerance_for_errors_the_accuracy_stays(stolen, thief, attack):
    quick = {"n_steps": 4} if attack is prune_adversarially else {"recover_epochs": 2}
    attacked = attack(stolen, thief, tolerance=0.0, mask_rate=10.0, **quick)
    assert accuracy(attacked, thief) >= accuracy(stolen, thief)


def test_channels_with_an_outlying_bound_are_pruned(stolen, thief, judge):
    with torch.no_grad():
        stolen.blocks[1].residual[0].weight[7] *= 40
        stolen.blocks[1].residual[1].weight[7] *= 3
        stolen.blocks[1].residual[1].running_var[7] *= 1600
    assert prune_lipschitz(stolen, thief, deviations=100).state_dict().keys() == stolen.state_dict().keys()
    attacked = prune_lipschitz(stolen, thief, deviations=3.5)
    norm = attacked.blocks[1].residual[1]
    assert norm.weight[7] == norm.bias[7] == 0
    assert n_silent(attacked) <= 2
    doses = []
    prune_lipschitz(
        stolen, thief, deviations=0.0, observe=lambda dose, model: doses.append((dose, n_silent(model)))
    )
    assert [dose for dose, _ in doses] == pytest.approx([n / 336 for _, n in doses])
    assert n_silent(prune_lipschitz(stolen, thief, deviations=0.0)) == doses[-1][1] > 100


def test_pruning_most_channels_by_their_bound_erases_the_mark(stolen, thief, judge):
    gentle, harsh = (prune_lipschitz(stolen, thief, deviations=u) for u in (3.0, 0.5))
    assert judge.accuracy(gentle) == pytest.approx(judge.accuracy(stolen), abs=0.03)
    assert judge.log10_p_value(harsh) > judge.log10_p_value(gentle)
    assert judge.log10_p_value(harsh) > -3


@pytest.mark.parametrize(
    ("attack", "setting"),
    [
        (prune_adversarially, {"noise": -1}),
        (prune_adversarially, {"clean_share": 2}),
        (prune_adversarially, {"n_images": 0}),
        (prune_adversarially, {"n_steps": 0}),
        (prune_adversarially, {"threshold": 2}),
        (prune_adversarially, {"tolerance": -1}),
        (prune_adversarially, {"mask_rate": -1}),
        (prune_reconstructively, {"unlearn_epochs": 0}),
        (prune_reconstructively, {"unlearned": 2}),
        (prune_reconstructively, {"loss_weight": -1}),
        (prune_reconstructively, {"unlearn_rate": -1}),
        (prune_reconstructively, {"mask_rate": -1}),
        (prune_reconstructively, {"recover_epochs": 0}),
        (prune_reconstructively, {"threshold": 2}),
        (prune_reconstructively, {"tolerance": 2}),
        (prune_lipschitz, {"deviations": float("inf")}),
    ],
)
def test_settings_are_checked(stolen, thief, attack, setting):
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` must be"):
        attack(stolen, thief, **setting)
