"""Attacks that go on training: labels, rates, penalties, sharpness."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from gradsigns_lightning.attacks import (
    fine_tune_with_sam,
    noise_labels,
    refit,
    regularize,
    shift_features,
    smooth_labels,
    super_fine_tune,
)
from gradsigns_lightning.attacks.base import predictions
from gradsigns_lightning.attacks.regularization import Best, fisher_information, split
from gradsigns_lightning.attacks.sharpness import sharpness_aware, uphill
from gradsigns_lightning.attacks.training import cross_entropy, train
from gradsigns_lightning.models import MLP, ViT

SHORT = {
    smooth_labels: {"epochs": 2},
    noise_labels: {"epochs": 2, "strength": 0.4},
    super_fine_tune: {"epochs": 2, "rate_factor": 1.0},
    regularize: {"decay_epochs": 1, "decay": 1e-3, "epochs": 2},
    shift_features: {"epochs": 3, "rate_factor": 1.0},
    refit: {"epochs": 2, "fisher_images": 20},
    fine_tune_with_sam: {"epochs": 2},
}


def weights(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def distance(model, other):
    return (weights(model) - weights(other)).norm().item()


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
    assert distance(attacked, stolen) > 0
    assert judge.accuracy(attacked) > 0.85
    assert doses == list(range(1, len(doses) + 1))
    assert len(doses) == SHORT[attack]["epochs"] + SHORT[attack].get("decay_epochs", 0)
    again = attack(stolen, thief, **SHORT[attack])
    assert torch.equal(weights(again), weights(attacked))  # seeded; watching changes nothing


@pytest.mark.parametrize(
    "network", [MLP((1, 8, 8), 10, (16,)), ViT((1, 8, 8), 10, patch_size=4, dim=8, heads=2)]
)
@pytest.mark.parametrize("attack", SHORT, ids=lambda attack: attack.__name__)
def test_networks_without_convolutions_and_batch_norm_are_attacked(attack, network, thief):
    attacked = attack(network, thief.part(torch.arange(64)), **SHORT[attack])
    assert weights(attacked).isfinite().all()
    assert not torch.equal(weights(attacked), weights(network))


@pytest.mark.parametrize(
    ("attack", "setting"),
    [
        (smooth_labels, {"strength": 1.5}),
        (noise_labels, {"labels": "none"}),
        (noise_labels, {"strength": -0.1}),
        (super_fine_tune, {"cycles": 1}),
        (super_fine_tune, {"floor": 2.0}),
        (regularize, {"decay": -1.0}),
        (regularize, {"patience": 0}),
        (shift_features, {"strength": -1.0}),
        (refit, {"rate_decay": 1.1}),
        (refit, {"fisher_images": 0}),
        (fine_tune_with_sam, {"radius": -1.0}),
        (fine_tune_with_sam, {"rate_factor": -1.0}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_settings_are_checked(attack, setting, stolen, thief):
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` must be"):
        attack(stolen, thief, **setting)


@pytest.mark.parametrize("attack", [smooth_labels, noise_labels], ids=lambda attack: attack.__name__)
def test_softer_targets_make_less_certain_models(attack, stolen, thief):
    def certainty(strength):
        attacked = attack(stolen, thief, strength=strength, epochs=4)
        return predictions(attacked, thief).softmax(1).amax(1).mean().item()

    assert certainty(0.6) < certainty(0.0) - 0.1


def test_the_rates_rise_and_fall(stolen, thief, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "gradsigns_lightning.attacks.fine_tuning.train", lambda *args, rate_at, **kwargs: seen.append(rate_at)
    )
    super_fine_tune(stolen, thief, cycles=4, second_peak=0.1, floor=0.01)
    at = [seen[0](progress / 16) for progress in range(16)]
    assert at[::4] == pytest.approx([0.01] * 4)
    assert at[2::4] == pytest.approx([1.0, 1.0, 0.1, 0.1])
    assert at[1] == pytest.approx((0.01 + 1.0) / 2)


def test_the_first_peak_erases_what_a_low_one_keeps(stolen, thief, judge):
    high, low = (judge.log10_p_value(super_fine_tune(stolen, thief, rate_factor=f)) for f in (10.0, 0.03))
    assert low < -5 < -2 < high


def test_rates_follow_the_given_schedule_and_training_stops_when_told(stolen, thief):
    rates, optimizers = [], []
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        optimizers.append(self)
        rates.append(self.param_groups[0]["lr"])
        return original(self, *args, **kwargs)

    recipe, epochs = thief.recipe.scaled(4, 0.1), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        train(
            copy.deepcopy(stolen),
            thief,
            recipe,
            rate_at=lambda progress: 1 - progress,
            stop=lambda: len(epochs) == 2,
            observe=lambda dose, model: epochs.append(dose),
        )
    assert epochs == [1, 2]
    assert rates[0] == pytest.approx(recipe.rate)
    assert rates[-1] == pytest.approx(recipe.rate / 2, rel=0.1)


def test_the_penalty_shrinks_all_weights(stolen, thief):
    def norm(decay):
        attacked = regularize(stolen, thief, decay=decay, decay_epochs=3, epochs=1, rate_factor=0.3)
        return sum(p.square().sum().item() for p in attacked.parameters())

    assert norm(1.0) < 0.9 * norm(0.0)


def test_patience_ends_the_second_phase_and_the_best_epoch_stays(stolen, thief):
    seen, states = [], []
    attacked = regularize(
        stolen,
        thief,
        decay_epochs=1,
        patience=1,
        epochs=30,
        observe=lambda dose, model: (seen.append(dose), states.append(weights(model).clone())),
    )
    assert len(seen) < 31
    assert torch.equal(weights(attacked), states[-2])  # the last epoch was worse than the one before


def test_held_out_images_are_not_trained_on(thief):
    kept, held_out = split(thief, seed=3)
    images = [torch.cat([x for x, _ in part.in_order()]).flatten(1) for part in (kept, held_out)]
    assert len(images[0]) + len(images[1]) == thief.n_images
    assert len(images[1]) == round(thief.n_images / 10)
    assert torch.cdist(*images).min() > 0
    with pytest.raises(ValueError, match="`data` must hold at least two images, got 1"):
        split(thief.part(torch.arange(1)), seed=0)


def test_a_part_of_images_that_are_read_one_by_one(thief):
    pairs = [(torch.full((1, 8, 8), float(i)), i % 10) for i in range(20)]
    whole = replace(thief, train=pairs, clean=pairs)
    x, y = next(iter(whole.part(torch.tensor([13, 4])).in_order()))
    assert (x.amax((1, 2, 3)).tolist(), y.tolist()) == ([13, 4], [3, 4])
    x, y = next(iter(whole.relabelled(torch.arange(20)).part(torch.tensor([13, 4])).in_order()))
    assert (x.amax((1, 2, 3)).tolist(), y.tolist()) == ([13, 4], [13, 4])


def test_the_lowest_loss_is_kept(stolen, thief):
    best = Best(stolen, thief, patience=2)
    assert not best.is_last()
    kept = weights(stolen).clone()
    with torch.no_grad():
        stolen.head.weight.zero_()
    assert not best.is_last()
    assert best.is_last()
    stolen.load_state_dict(best.state)
    assert torch.equal(weights(stolen), kept)


def test_the_new_head_leaves_the_old_ones_direction_and_keeps_its_norm(stolen, thief):
    def cosine(strength):
        head = shift_features(stolen, thief, strength=strength, epochs=4, rate_factor=1.0).head.weight
        assert head.norm().item() == pytest.approx(stolen.head.weight.norm().item(), rel=1e-4)
        return torch.cosine_similarity(head.flatten(), stolen.head.weight.flatten(), dim=0).item()

    assert cosine(2.0) < min(-0.2, cosine(0.0) - 0.2)


def test_consolidation_holds_the_weights_that_matter(stolen, thief):
    fisher = fisher_information(stolen, thief, 60, seed=0)
    assert max(f.max().item() for f in fisher) == pytest.approx(1)
    assert min(f.min().item() for f in fisher) >= 0

    def moved(consolidation):
        attacked = refit(stolen, thief, consolidation=consolidation, fisher_images=60, epochs=2)
        pairs = zip(fisher, attacked.parameters(), stolen.parameters(), strict=True)
        return sum((f * (p - q).square()).sum().item() for f, p, q in pairs)

    assert moved(1e4) < 0.5 * moved(0.0)


def test_fisher_information_is_that_of_a_softmax_layer(thief):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    fisher = fisher_information(model, thief, 10**6, seed=0)
    x = torch.cat([x for x, _ in thief.in_order()]).flatten(1).double()
    p = predictions(model, thief).double().softmax(1)
    expected = (p * (1 - p)).T @ x.square()  # E (1[k] - p_k)^2 x_j^2 over the labels that the model gives
    ratio = fisher[0].double().sum() / fisher[0].double().max() / (expected.sum() / expected.max())
    assert torch.corrcoef(torch.stack([fisher[0].double().flatten(), expected.flatten()]))[0, 1] > 0.95
    assert ratio == pytest.approx(1, abs=0.15)


def test_weights_go_uphill_by_the_adaptive_rule_and_come_back():
    first, second = (nn.Parameter(torch.tensor(v)) for v in ([3.0, -1.0], [2.0]))
    first.grad, second.grad = torch.tensor([1.0, 2.0]), torch.tensor([0.0])
    with uphill([first, second], radius=0.5):
        norm = (9 + 4) ** 0.5
        expected = torch.tensor([3 + 0.5 * 9 / norm, -1 + 0.5 * 2 / norm])
        assert torch.allclose(first, expected)
        assert second.item() == 2
    assert first.tolist() == [3, -1]


def test_the_second_pass_gives_gradients_uphill_and_leaves_running_statistics(stolen, thief):
    loss, before_step = sharpness_aware(cross_entropy(), stolen, list(stolen.parameters()), radius=0.5)
    x, y = next(iter(thief.in_order(64)))
    stolen.train()
    loss(stolen, x, y).backward()
    plain = [p.grad.clone() for p in stolen.parameters()]
    buffers, kept = copy.deepcopy(dict(stolen.named_buffers())), weights(stolen).clone()
    before_step(0)
    assert all(torch.equal(value, buffers[name]) for name, value in stolen.named_buffers())
    assert torch.equal(weights(stolen), kept)
    assert not all(torch.allclose(p.grad, g) for p, g in zip(stolen.parameters(), plain, strict=True))


def test_a_radius_finds_flatter_minima(stolen, thief):
    """The loss of the plain copy rises more when its weights go uphill."""

    def rise(radius):
        attacked = fine_tune_with_sam(stolen, thief, radius=radius, epochs=3)
        x, y = next(iter(thief.in_order(512)))
        loss = cross_entropy(thief.recipe.label_smoothing)
        before = loss(attacked, x, y)
        before.backward()
        with uphill(list(attacked.parameters()), 1.0), torch.no_grad():
            return (loss(attacked, x, y) - before).item()

    assert rise(2.0) < 0.8 * rise(0.0)
