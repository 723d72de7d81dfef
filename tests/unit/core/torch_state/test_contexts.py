"""Contexts of the embedding and reading passes leave nothing changed."""

import pytest
import torch
from torch import nn

from gradsigns_lightning.core.torch_state.contexts import (
    frozen_statistics,
    gradients_enabled,
    twice_differentiable_kernels,
)


class Stubborn(nn.Module):
    """A frozen backbone that overrides train(), as user code does."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x):
        return self.norm(x)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        nn.Dropout(0.5),
        nn.Sequential(nn.BatchNorm1d(4).eval(), Stubborn()),
        nn.Linear(4, 2),
    )
    model[3][1].norm.training = True  # set behind the module's back
    return model


def snapshot(model):
    flags = [m.training for m in model.modules()]
    buffers = {k: v.clone() for k, v in model.state_dict().items()}
    return (
        flags,
        buffers,
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


def assert_same(before, after):
    assert before[0] == after[0]
    assert all(torch.equal(before[1][k], after[1][k]) for k in before[1])
    assert torch.equal(before[2], after[2])
    assert before[3:] == after[3:]


def test_the_snapshot_sees_a_plain_pass():
    model = network()
    before = snapshot(model)
    model(torch.randn(8, 4))
    with pytest.raises(AssertionError):
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("raising", [False, True])
def test_everything_is_as_before(raising):
    model, x = network(), torch.randn(8, 4)
    before = snapshot(model)
    assert True in before[0]
    assert False in before[0]

    def use():
        with gradients_enabled(), frozen_statistics(model), twice_differentiable_kernels(model, "cpu"):
            assert not any(m.training for m in model.modules())
            model(x)
            torch.rand(3)
            if raising:
                raise KeyError("user code")

    if raising:
        with pytest.raises(KeyError):
            use()
    else:
        use()
    assert_same(before, snapshot(model))


def test_dropout_is_off_and_samples_are_not_coupled():
    model, x = network(), torch.randn(8, 4)
    with frozen_statistics(model):
        whole, alone = model(x), torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(whole, alone)
    torch.testing.assert_close(whole, model.eval()(x))


def test_modules_that_override_train_are_frozen_too():
    class Never(nn.Dropout):
        def train(self, mode=True):
            return self

    model = nn.Sequential(Never(0.9))
    with frozen_statistics(model):
        assert torch.equal(model(torch.ones(100)), torch.ones(100))
    assert model[0].training


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_enabled_and_the_mode_comes_back(outer):
    with outer():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with gradients_enabled():
            x = torch.ones(2, requires_grad=True)
            assert torch.autograd.grad((x * x).sum(), x)[0].tolist() == [2, 2]
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


def test_autocast_and_fused_attention_are_off_inside_only():
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        with twice_differentiable_kernels(nn.Linear(2, 2), "cpu"):
            assert not torch.is_autocast_enabled("cpu")
            assert torch.backends.cuda.math_sdp_enabled()
            assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == flags


@pytest.mark.parametrize(("module", "off"), [(nn.LSTM(2, 2), True), (nn.Linear(2, 2), False)])
def test_cudnn_is_off_for_recurrent_networks_on_cuda(module, off, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.backends.cudnn, "flags", lambda **k: calls.append(k) or torch.enable_grad())
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: torch.enable_grad())
    with twice_differentiable_kernels(module, "cuda"):
        pass
    assert calls == ([{"enabled": False}] if off else [])


def test_recurrent_networks_on_cuda_with_the_real_flags():
    before = torch.backends.cudnn.enabled
    with twice_differentiable_kernels(nn.LSTM(2, 2), "cuda"):
        assert not torch.backends.cudnn.enabled
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.enabled == before


NORMS = {
    "1d": lambda: (nn.BatchNorm1d(3), (6, 3)),
    "1d, sequences": lambda: (nn.BatchNorm1d(3), (6, 3, 5)),
    "2d": lambda: (nn.BatchNorm2d(3, eps=1e-2), (4, 3, 2, 2)),
    "3d": lambda: (nn.BatchNorm3d(3), (4, 3, 2, 2, 2)),
    "without weights": lambda: (nn.BatchNorm2d(3, affine=False), (4, 3, 2, 2)),
    "synchronised": lambda: (nn.SyncBatchNorm(3), (4, 3, 2, 2)),
}


def norm_of(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    norm, shape = NORMS[name]()
    norm.double()
    for tensor in [*norm.parameters(), norm.running_mean, norm.running_var]:
        tensor.data.uniform_(0.5, 2)
    return norm.eval(), torch.randn(shape, dtype=torch.float64, requires_grad=True)


def derivatives(norm: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return output, input gradient, and the gradients of a function of the latter."""
    y = norm(x)
    (gradient,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
    return [y, gradient, *torch.autograd.grad(gradient.square().sum(), [x, *norm.parameters()])]


@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_has_the_derivatives_of_torch_s_own(name):
    norm, x = norm_of(name)
    expected = derivatives(norm, x)
    with twice_differentiable_kernels(norm, "cpu"):
        given = derivatives(norm, x)
    torch.testing.assert_close(given, expected)
    graph = [str(type(values[0].grad_fn)) for values in (expected, given)]
    assert "BatchNorm" in graph[0]
    assert "BatchNorm" not in graph[1]


def test_batch_norm_with_the_batch_s_statistics_is_torch_s_own():
    norm, x = norm_of("2d")
    norm.train()
    with twice_differentiable_kernels(norm, "cpu"):
        y = norm(x)
    torch.testing.assert_close(
        y, nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True, eps=norm.eps)
    )
    assert norm.num_batches_tracked == 1
    free = nn.BatchNorm2d(3, track_running_stats=False).double().eval()
    with twice_differentiable_kernels(free, "cpu"):
        torch.testing.assert_close(free(x), nn.functional.batch_norm(x, None, None, None, None, True))


@pytest.mark.parametrize("enabled", [True, False])
def test_a_normalisation_of_inference_tensors(enabled):
    norm, x = norm_of("2d")
    network = nn.Sequential(nn.Conv2d(3, 3, 1).double(), norm.train())
    with torch.inference_mode(), torch.set_grad_enabled(enabled):
        x = x.clone()
        with frozen_statistics(network), twice_differentiable_kernels(network, "cpu"):
            y = network(x)
    torch.testing.assert_close(y, network.eval()(x.clone()))
