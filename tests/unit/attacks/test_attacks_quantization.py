import pytest
import torch
from torch import nn

from gradsigns_lightning.attacks import quantize, quantize_int8
from gradsigns_lightning.attacks.quantization import IntegerLinear
from gradsigns_lightning.attacks.recovery import weights_of


def kernels(model):
    return [getattr(module, name).detach() for module, name in weights_of(model)]


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_a_layer_has_as_many_values_as_bits_allow(stolen, thief, bits):
    by_layer = quantize(stolen, thief, bits=bits, epochs=0)
    by_channel = quantize(stolen, thief, bits=bits, scale="channel", epochs=0)
    for before, rounded, finer in zip(kernels(stolen), kernels(by_layer), kernels(by_channel), strict=True):
        assert len(rounded.unique()) <= 2**bits
        assert len(finer[0].unique()) <= 2**bits
        width = (before.max() - before.min()) / (2**bits - 1)
        assert (rounded - before).abs().max() <= width / 2 * 1.001
        assert torch.isclose(rounded.max(), before.max())
        assert (finer - before).norm() < (rounded - before).norm()
    assert torch.equal(by_layer.head.bias, stolen.head.bias)


def test_a_constant_layer_stays(thief):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.constant_(network[1].weight, 0.25)
    assert (quantize(network, thief, bits=2, epochs=0)[1].weight == 0.25).all()


def test_many_bits_keep_the_mark_and_few_do_not(stolen, thief, judge):
    seen = {}
    quantize(
        stolen,
        thief,
        bits=2,
        epochs=0,
        observe=lambda dose, model: seen.update({dose: (judge.accuracy(model), judge.log10_p_value(model))}),
    )
    assert list(seen) == [1, 2, 3, 4, 5, 6, 7]
    before = judge.accuracy(stolen), judge.log10_p_value(stolen)
    assert seen[1][0] == pytest.approx(before[0], abs=0.02)
    assert seen[1][1] < before[1] + 1
    assert seen[7][1] > -3


def test_fine_tuning_leaves_the_levels(stolen, thief, judge):
    attacked = quantize(stolen, thief, bits=4, epochs=1)
    assert judge.accuracy(attacked) > 0.9
    assert len(kernels(attacked)[2].unique()) > 16


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_int8_is_close_and_has_an_input_gradient(stolen, thief, judge, activations):
    attacked = quantize_int8(stolen, thief, activations=activations)
    assert isinstance(attacked.head, IntegerLinear) == (activations == "int8")
    assert judge.accuracy(attacked) == pytest.approx(judge.accuracy(stolen), abs=0.02)
    assert judge.log10_p_value(attacked) < judge.log10_p_value(stolen) + 2
    kernel = attacked.blocks[1].residual[0].weight
    assert len(kernel[0].unique()) <= 256 < len(kernel.unique())
    assert not torch.equal(kernel, stolen.blocks[1].residual[0].weight)
    x = torch.stack([thief.clean[i][0] for i in range(64)]).requires_grad_(True)
    slopes = [torch.autograd.grad(model(x)[:, 3].sum(), x)[0].flatten() for model in (stolen, attacked)]
    assert torch.cosine_similarity(*slopes, dim=0) > 0.95


def test_what_is_differentiated_is_what_is_returned(thief):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    attacked = quantize_int8(network, thief)
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        plain, exact = attacked(x), network(x)
    assert torch.allclose(attacked(x), plain, atol=1e-6)
    assert 1e-4 < (plain - exact).abs().max() < 0.1


@pytest.mark.parametrize(
    ("attack", "setting"),
    [
        (quantize, {"bits": 1}),
        (quantize, {"bits": 9}),
        (quantize, {"scale": "row"}),
        (quantize, {"epochs": -1}),
        (quantize_int8, {"activations": "int4"}),
    ],
)
def test_settings_are_checked(stolen, thief, attack, setting):
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` must be"):
        attack(stolen, thief, **setting)
