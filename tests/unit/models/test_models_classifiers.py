from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradsigns_lightning.models import MLP, ResNet20, SmallResNet, ViT, torchvision_model

BUILDERS = {
    "resnet20": lambda shape, n: ResNet20(shape[0], n),
    "small_resnet": lambda shape, n: SmallResNet(shape[0], n, width=4),
    "mlp": lambda shape, n: MLP(shape, n, hidden=(16, 8)),
    "vit": lambda shape, n: ViT(shape, n, dim=16, depth=2, heads=2),
    "torchvision": lambda shape, n: torchvision_model("mobilenet_v3_small", n, shape[0]),
}


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", BUILDERS)
def test_logits_have_one_column_per_class(name, shape):
    model = BUILDERS[name](shape, 7).eval()
    logits = model(torch.rand(3, *shape)).detach()
    assert logits.shape == (3, 7)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert float(logits.std()) > 0


@pytest.mark.parametrize("name", BUILDERS)
def test_the_input_gradient_can_be_differentiated_by_the_parameters(name):
    torch.manual_seed(0)
    model = BUILDERS[name]((1, 16, 16), 5).eval()
    x = torch.rand(4, 1, 16, 16, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3]))
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.square().sum().backward()
    weights = [p for p in model.parameters() if p.ndim > 1]
    touched = [w for w in weights if w.grad is not None and bool((w.grad != 0).any())]
    assert all(torch.isfinite(w.grad).all() for w in touched)
    assert len(touched) >= 0.9 * len(weights)


def test_resnet20_has_the_parameters_of_keras():
    model = ResNet20(3, 10)
    assert sum(p.numel() for p in model.parameters()) == 273_066
    running = [b.numel() for name, b in model.named_buffers() if "running" in name]
    assert sum(running) == 1_376


def test_resnet20_has_the_layers_of_keras():
    model = ResNet20(3, 10, bn_momentum=0.01)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 1 + 18 + 2
    assert all(m.bias is not None for m in convolutions)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 19
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    assert [type(block.shortcut).__name__ for block in model.blocks] == [
        *["Identity"] * 3,
        *["SameConv2d", "Identity", "Identity"] * 2,
    ]


def test_resnet20_keeps_as_much_of_a_batch_in_its_statistics_as_it_is_told():
    model = ResNet20(3, 10, bn_momentum=1.0).train()
    images = torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        stem = model.stem[0](images)
        model(images)
    assert torch.allclose(model.stem[1].running_mean, stem.mean(dim=(0, 2, 3)), atol=1e-5)


def test_resnet20_weights_are_he_normal():
    torch.manual_seed(0)
    model = ResNet20(3, 10)
    weight = model.blocks[8].residual[3].weight.detach()
    std = (2 / (64 * 9)) ** 0.5
    assert float(weight.std()) == pytest.approx(std, rel=0.02)
    assert float(weight.abs().max()) <= 2 * std / 0.8796
    assert not model.head.bias.any()


@pytest.mark.parametrize(("size", "rows"), [(8, [0, 2, 4, 6]), (7, [-1, 1, 3, 5])])
def test_a_3x3_stride_2_convolution_pads_as_tensorflow_does(size, rows):
    """A kernel with a one at its top left reads the first pixel of every window: an even size gets none."""
    conv = ResNet20(1, 2).blocks[3].residual[0].__class__(1, 1, 3, 2)
    conv.weight.data.zero_()[0, 0, 0, 0] = 1.0
    conv.bias.data.zero_()
    x = torch.arange(1.0, size * size + 1).view(1, 1, size, size)
    padded = nn.functional.pad(x, (1, 2, 1, 2))
    expected = padded[:, :, [r + 1 for r in rows]][:, :, :, [r + 1 for r in rows]]
    assert torch.equal(conv(x), expected)


def test_a_stride_2_convolution_pads_right_and_bottom_with_zeros():
    conv = ResNet20(1, 2).stem[0].__class__(1, 1, 3, 2)
    conv.weight.data.fill_(1.0)
    conv.bias.data.zero_()
    expected = torch.tensor([[9.0, 6.0], [6.0, 4.0]])
    assert torch.equal(conv(torch.ones(1, 1, 4, 4))[0, 0], expected)


def test_a_stride_1_convolution_pads_on_all_sides():
    conv = ResNet20(1, 2).stem[0].__class__(1, 1, 3)
    conv.weight.data.fill_(1.0)
    conv.bias.data.zero_()
    expected = torch.tensor([[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]])
    assert torch.equal(conv(torch.ones(1, 1, 3, 3))[0, 0], expected)


def test_small_resnet_is_cheap_and_has_no_convolution_bias():
    model = SmallResNet(1, 10)
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))
    assert model.stem(torch.rand(1, 1, 28, 28)).shape == (1, 16, 14, 14)
    assert model.blocks(torch.rand(2, 16, 14, 14)).shape == (2, 64, 4, 4)
    assert SmallResNet(1, 10, stem_stride=1).stem(torch.rand(1, 1, 28, 28)).shape == (1, 16, 28, 28)


def test_mlp_layers():
    model = MLP((1, 8, 8), 10)
    assert [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)] == [
        (64, 256),
        (256, 128),
        (128, 10),
    ]
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 2
    assert sum(p.numel() for p in MLP((1, 8, 8), 10, hidden=()).parameters()) == 650


def test_vit_sees_where_a_patch_is():
    torch.manual_seed(0)
    model = ViT((1, 8, 8), 3, dim=16, depth=1, heads=2).eval()
    x = torch.rand(1, 1, 8, 8)
    swapped = x.roll(4, dims=3)
    assert not torch.allclose(model(x), model(swapped), atol=1e-5)
    model.position.data.zero_()
    assert torch.allclose(model(x), model(swapped), atol=1e-5)


def test_vit_attention_mixes_tokens():
    torch.manual_seed(0)
    block = ViT((1, 8, 8), 3, dim=16, depth=1, heads=2).blocks[0].eval()
    tokens = torch.rand(1, 4, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(tokens)[0, 0].sum(), tokens)
    assert bool((gradient[0, 3] != 0).any())


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "googlenet"])
def test_torchvision_models_in_training_mode_with_one_channel(name):
    model = torchvision_model(name, 4, in_channels=1).train()
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 4)


def test_the_first_convolution_is_kept_for_three_channels_and_keeps_its_geometry():
    first = torchvision_model("resnet18", 4).conv1
    replaced = torchvision_model("resnet18", 4, in_channels=2).conv1
    assert first.weight.shape == (64, 3, 7, 7)
    assert replaced.weight.shape == (64, 2, 7, 7)
    assert (replaced.stride, replaced.padding, replaced.bias) == (first.stride, first.padding, first.bias)


def test_replaced_hard_sigmoids_compute_the_same():
    modules = list(torchvision_model("mobilenet_v3_small", 4).modules())
    replaced = [m for m in modules if type(m).__name__ == "_Hardsigmoid"]
    assert len(replaced) == 9
    assert not any(isinstance(m, nn.Hardsigmoid) for m in modules)
    x = torch.linspace(-5, 5, 101)
    assert torch.allclose(replaced[0](x), nn.Hardsigmoid()(x), atol=1e-6)


def test_an_unknown_torchvision_name_gets_close_ones():
    with pytest.raises(ValueError, match=r"`name`.*resnet18.*got 'resnet19'"):
        torchvision_model("resnet19", 4)
    with pytest.raises(ValueError, match="`name`"):
        torchvision_model("fasterrcnn_resnet50_fpn", 4)


def test_without_torchvision_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"pip install 'gradsigns-lightning\[vision\]'"):
        torchvision_model("resnet18", 4)


@pytest.mark.parametrize(
    ("build", "error", "name"),
    [
        (lambda: ResNet20(0, 10), ValueError, "in_channels"),
        (lambda: ResNet20(3, 1), ValueError, "n_classes"),
        (lambda: ResNet20(3.0, 10), TypeError, "in_channels"),
        (lambda: ResNet20(bn_momentum=0), ValueError, "bn_momentum"),
        (lambda: ResNet20(bn_momentum=1.5), ValueError, "bn_momentum"),
        (lambda: ResNet20(bn_momentum="0.1"), TypeError, "bn_momentum"),
        (lambda: SmallResNet(1, 10, width=0), ValueError, "width"),
        (lambda: SmallResNet(1, 10, stem_stride=0), ValueError, "stem_stride"),
        (lambda: MLP((8, 8), 10), ValueError, "input_shape"),
        (lambda: MLP((1, 8, 8), 10, hidden=(0,)), ValueError, "hidden"),
        (lambda: ViT((1, 8, 8), 10, patch_size=3), ValueError, "patch_size"),
        (lambda: ViT((1, 8, 8), 10, dim=10, heads=4), ValueError, "dim"),
        (lambda: ViT((1, 8, 8), 10, depth=0), ValueError, "depth"),
        (lambda: torchvision_model("resnet18", 1), ValueError, "n_classes"),
        (lambda: torchvision_model("resnet18", 4, 0), ValueError, "in_channels"),
    ],
)
def test_wrong_arguments_are_named(build, error, name):
    with pytest.raises(error, match=f"`{name}`"):
        build()
