import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradsigns_lightning import attacks
from gradsigns_lightning.attacks.channels import channel_groups, check_preserved
from gradsigns_lightning.attacks.layer_rewrites import fold_batch_norm, fuse_layers, insert_layers
from gradsigns_lightning.attacks.rewrites import add_dummy_neurons, permute_neurons, rescale_neurons
from gradsigns_lightning.attacks.round_trips import (
    export_round_trip,
    onnx_round_trip,
    torchscript_round_trip,
)
from gradsigns_lightning.models import MLP, ResNet20, ViT

REWRITES = [
    attacks.NeuronPermutation(),
    attacks.NeuronRescaling(),
    attacks.DummyNeurons(),
    attacks.DummyNeurons(variant="split"),
    attacks.BatchNormFolding(),
    attacks.LayerInsertion(),
]
READABLE = [*REWRITES, attacks.TorchScriptRoundTrip(), attacks.ExportRoundTrip()]
ALL = [*READABLE, attacks.OnnxRoundTrip()]
IMAGES = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def name(attack):
    return type(attack).__name__ + str(getattr(attack, "variant", ""))


def shaken(model):
    """Give every normalization other statistics and weights, so that none of them is the identity."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for value, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
                (module.weight.data, -1, 2),
                (module.bias.data, -1, 1),
            ):
                value.copy_(low + (high - low) * torch.rand(value.shape, generator=generator))
    return model.eval()


def changed(before, after):
    """Share of the parameters that are nowhere any more."""
    left, values = list(after.parameters()), list(before.parameters())
    same = [v for v in values if any(v.shape == p.shape and torch.equal(v, p) for p in left)]
    return 1 - len(same) / len(values)


def layers(model):
    return [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


class Mixed(nn.Module):
    """Depthwise convolution, pooling functions, a flattened map, normalized rows, a layer called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.each = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.pool, self.wide = nn.MaxPool2d(2), nn.Linear(6 * 16, 20)
        self.norm, self.twice, self.head = nn.BatchNorm1d(20), nn.Linear(20, 20), nn.Linear(20, 10)

    def forward(self, x):
        x = self.pool(F.max_pool2d(F.relu(self.each(F.relu(self.first(x)))), 1))
        x = torch.relu(self.norm(self.wide(x.view(x.size(0), -1))))
        x = torch.relu(self.twice(torch.relu(self.twice(x)))) + x
        return self.head(x)


@torch.no_grad()
def logits(model):
    return model(IMAGES)


@pytest.mark.parametrize("attack", ALL, ids=name)
def test_the_function_stays_and_the_model_given_too(stolen, thief, attack):
    stolen.train()
    before, flags = copy.deepcopy(stolen.state_dict()), [m.training for m in stolen.modules()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    doses = []
    attacked = attack(stolen, thief, observe=lambda dose, model: doses.append((dose, model)))
    assert torch.equal(state[0], torch.get_rng_state())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]
    assert flags == [m.training for m in stolen.modules()]
    assert all(torch.equal(before[name], value) for name, value in stolen.state_dict().items())
    assert not attacked.training
    assert attacked.eval() is attacked
    assert [model for _, model in doses] == [attacked]
    torch.testing.assert_close(logits(attacked), logits(stolen.eval()), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(copy.deepcopy(attacked)), logits(stolen), atol=1e-4, rtol=0)


@pytest.mark.parametrize("attack", READABLE, ids=name)
def test_the_mark_notices_nothing(stolen, thief, judge, attack):
    attacked = attack(stolen, thief)
    before, after = judge.verify(stolen), judge.verify(attacked)
    assert (after.n_matches, after.n_erasures) == (before.n_matches, 0)
    assert after.margin == pytest.approx(before.margin, rel=1e-3)
    assert after.log10_p_value == pytest.approx(before.log10_p_value, rel=1e-4)
    assert before.log10_p_value < -5
    assert judge.accuracy(attacked) == judge.accuracy(stolen)


@pytest.mark.parametrize("attack", REWRITES, ids=name)
def test_the_weights_are_others(stolen, thief, attack):
    attacked = attack(stolen, thief)
    if name(attack) == "LayerInsertion":  # which leaves normalization as it is
        stolen, attacked = (nn.ModuleList(layers(model)) for model in (stolen, attacked))
    assert changed(stolen, attacked) > 0.9


@pytest.mark.parametrize(
    "attack", [attack for attack in REWRITES if name(attack) != "BatchNormFolding"], ids=name
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: ResNet20(1, 10),
        lambda: MLP((1, 8, 8), 10, (32, 16)),
        lambda: ViT((1, 8, 8), 10, patch_size=2, dim=16, depth=2, heads=2),
        Mixed,
    ],
    ids=["resnet20", "mlp", "vit", "mixed"],
)
def test_networks_of_all_kinds_keep_their_function(thief, attack, make):
    torch.manual_seed(0)
    model = shaken(make())
    if isinstance(model, ViT) and name(attack) == "NeuronRescaling":
        with pytest.raises(ValueError, match="joined by ReLU, got ViT"):
            attack(model, thief)
        return
    attacked = attack(model, thief)
    scale = float(logits(model).abs().max())
    torch.testing.assert_close(logits(attacked), logits(model), atol=1e-5 * max(1, scale), rtol=0)
    assert changed(model, attacked) > 0.1


@pytest.mark.parametrize("attack", [attacks.TorchScriptRoundTrip(), attacks.OnnxRoundTrip()], ids=name)
def test_networks_of_all_kinds_come_back(thief, attack):
    torch.manual_seed(0)
    vit = ViT((1, 8, 8), 10, patch_size=2, dim=16, depth=2, heads=2)
    for model in (shaken(ResNet20(1, 10)), vit, shaken(Mixed())):
        torch.testing.assert_close(logits(attack(model, thief)), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "attack", [attacks.NeuronPermutation(), attacks.NeuronRescaling(), attacks.LayerInsertion()], ids=name
)
def test_a_mark_in_the_weights_is_gone(stolen, thief, attack):
    """Read the bits as Uchida et al. (ICMR 2017) do; they would be the mark of a network that carries one."""

    def bits(model):
        layer = model.blocks[0].residual[3]
        layer = layer[0] if isinstance(layer, nn.Sequential) else layer
        weights = layer.weight.detach().mean(0).flatten()
        projection = torch.randn(256, 144, generator=torch.Generator().manual_seed(0))
        return projection @ weights > 0

    assert (bits(attack(stolen, thief)) == bits(stolen)).float().mean() < 0.8


def test_channels_that_a_shortcut_ties_are_one_group(stolen):
    groups = channel_groups(stolen)
    assert sorted(group.n_channels for group in groups) == [16, 16, 32, 32, 64, 64]
    tied = next(group for group in groups if stolen.stem[0] in group.makers)
    assert stolen.blocks[0].residual[3] in tied.makers
    assert stolen.blocks[1].shortcut[0] in tied.readers


def test_every_channel_that_is_free_has_another_place(thief):
    torch.manual_seed(0)
    model = MLP((1, 8, 8), 10, (64,))
    rows = permute_neurons(model, thief).layers[1].weight
    same = [torch.equal(a, b) for a, b in zip(rows, model.layers[1].weight, strict=True)]
    assert sum(same) < 5
    assert torch.equal(rows.sort(0).values, model.layers[1].weight.sort(0).values)


def test_factors_reach_the_spread(thief):
    torch.manual_seed(0)
    model = MLP((1, 8, 8), 10, (64,))
    factors = rescale_neurons(model, thief, spread=100).layers[1].bias / model.layers[1].bias
    assert 30 < factors.max() <= 100
    assert 0.01 <= factors.min() < 1 / 30


def test_signs_flip_where_normalization_follows_and_nowhere_else(stolen, thief):
    attacked = rescale_neurons(stolen, thief)
    flipped = (attacked.stem[0].weight * stolen.stem[0].weight).flatten(1).sum(1) < 0
    assert 0 < flipped.sum() < 16
    assert (attacked.blocks[0].residual[1].bias * stolen.blocks[0].residual[1].bias >= 0).all()
    torch.manual_seed(0)
    model = MLP((1, 8, 8), 10, (64,))
    assert (rescale_neurons(model, thief).layers[1].bias / model.layers[1].bias > 0).all()


def test_dummies_are_as_many_as_told_and_say_so(stolen, thief):
    grown = add_dummy_neurons(stolen, thief, share=0.5)
    assert (grown.stem[0].out_channels, grown.stem[1].num_features, grown.head.in_features) == (24, 24, 96)
    assert grown.stem[0].weight.shape == (24, 1, 3, 3)
    split = add_dummy_neurons(stolen, thief, variant="split", share=1)
    assert split.head.in_features == 128
    new = grown.stem[0].weight[16:]
    assert torch.equal(new[:4], new[4:])
    assert not torch.equal(new[:2], new[2:4])


def test_no_normalization_is_left(stolen, thief):
    folded = fold_batch_norm(stolen, thief)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.manual_seed(0)
    fold_batch_norm(shaken(ResNet20(1, 10)), thief)


def test_fusing_takes_inserted_layers_back(stolen, thief):
    inserted = insert_layers(stolen, thief)
    assert isinstance(inserted.head, nn.Sequential)
    assert not torch.allclose(inserted.head[0].weight, stolen.head.weight, atol=0.01)
    fused = fuse_layers(inserted, thief)
    torch.testing.assert_close(fused.head[0].weight, stolen.head.weight, atol=1e-5, rtol=1e-4)
    n_layers = [len(layers(model)) for model in (stolen, inserted, fused)]
    assert n_layers == [n_layers[0], 2 * n_layers[0], n_layers[0]]
    with pytest.raises(ValueError, match="nothing between them, got SmallResNet"):
        fuse_layers(stolen, thief)


def test_a_program_of_onnx_has_no_gradients_and_answers(stolen, thief):
    program = onnx_round_trip(stolen, thief)
    assert attacks.OnnxRoundTrip.kind == "responses"
    assert not program(IMAGES.clone().requires_grad_()).requires_grad
    assert program(IMAGES[:1]).shape == (1, 10)


@pytest.mark.parametrize("round_trip", [torchscript_round_trip, export_round_trip, onnx_round_trip])
def test_what_cannot_be_converted_is_refused(thief, round_trip):
    class Odd(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    with pytest.raises(ValueError, match=r"`model` must be convertible to .*, got Odd"):
        round_trip(Odd(), thief)


@pytest.mark.parametrize(
    "rewrite", [permute_neurons, rescale_neurons, add_dummy_neurons, fold_batch_norm, insert_layers]
)
def test_what_cannot_be_traced_is_refused(thief, rewrite):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"`model` must be traceable by torch.fx, got Branching"):
        rewrite(Branching(), thief)


def test_a_layer_that_lies_about_itself_is_found_out(thief):
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + self.weight[0, 0] + torch.arange(float(self.out_features))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), Odd(64, 32), nn.ReLU(), nn.Linear(32, 10))
    with pytest.raises(ValueError, match="`model` must compute as its layers' types say"):
        permute_neurons(model, thief)
    assert check_preserved(model, model, thief) is model


@pytest.mark.parametrize(
    ("rewrite", "setting"),
    [
        (rescale_neurons, {"spread": 0.5}),
        (add_dummy_neurons, {"variant": "other"}),
        (add_dummy_neurons, {"share": 0}),
        (add_dummy_neurons, {"share": 1.5}),
    ],
)
def test_settings_are_checked(stolen, thief, rewrite, setting):
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` must be"):
        rewrite(stolen, thief, **setting)


@pytest.mark.parametrize("rewrite", [permute_neurons, rescale_neurons, add_dummy_neurons, fold_batch_norm])
def test_nothing_to_rewrite_is_refused(thief, rewrite):
    with pytest.raises(ValueError, match=r"`model` must have .* got Sequential"):
        rewrite(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), thief)
