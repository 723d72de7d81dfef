"""The running means of batch normalization follow the layer before, if that is requested."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradsigns_lightning.core.torch_state.contexts import frozen_statistics, twice_differentiable_kernels
from gradsigns_lightning.core.torch_state.running_mean import RunningMeans


class Functions(nn.Module):
    """A network of functions, without modules that could have hooks."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        x = F.conv2d(x, self.conv.weight, self.conv.bias)
        norm = self.norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training)


def modules() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))


def bias_gradient(model: nn.Module) -> torch.Tensor:
    x = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    with twice_differentiable_kernels(model, "cpu"):
        bias = next(p for name, p in model.named_parameters() if name.endswith("bias"))
        return torch.autograd.grad(model(x).sum(), bias)[0]


@pytest.mark.parametrize("make", [modules, Functions])
def test_a_shift_that_normalisation_takes_out_again_has_no_derivative(make):
    model = make()
    with frozen_statistics(model) as training:
        assert (bias_gradient(model) > 1).all()  # frozen statistics alone are constants
        with RunningMeans(training).followed():
            assert (bias_gradient(model).abs() < 1e-4).all()
        assert (bias_gradient(model) > 1).all()


def test_the_values_stay():
    model, x = modules(), torch.rand(4, 1, 5, 5)
    model[1].running_mean.uniform_(-1, 1)
    with frozen_statistics(model) as training, twice_differentiable_kernels(model, "cpu"):
        expected = model(x)
        with RunningMeans(training).followed(), twice_differentiable_kernels(model, "cpu"):
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "still", [lambda norm: norm.eval(), lambda norm: setattr(norm, "momentum", 0.0)], ids=["eval", "0"]
)
def test_statistics_that_do_not_follow_in_training_are_constants(still):
    model = modules()
    still(model[1])
    with frozen_statistics(model) as training, RunningMeans(training).followed():
        assert (bias_gradient(model) > 1).all()


def test_another_tensor_in_a_running_means_place_is_a_constant():
    model = modules()
    with frozen_statistics(model) as training, RunningMeans(training).followed():
        model[1].running_mean = model[1].running_mean.clone()
        assert (bias_gradient(model) > 1).all()


def test_another_networks_statistics_are_constants():
    model, other = modules(), modules()
    with frozen_statistics(model), frozen_statistics(other) as training, RunningMeans(training).followed():
        assert (bias_gradient(model) > 1).all()
        assert (bias_gradient(other).abs() < 1e-4).all()


def test_norms_without_running_statistics_are_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False))
    x = torch.rand(4, 1, 5, 5)
    expected = model(x)
    with (
        frozen_statistics(model) as training,
        RunningMeans(training).followed(),
        twice_differentiable_kernels(model, "cpu"),
    ):
        assert torch.equal(model(x), expected)


def test_nothing_is_put_on_the_users_module():
    model = modules()
    before = pickle.dumps(model)
    with RunningMeans(list(model.modules())).followed():
        assert pickle.dumps(model) == before


def test_an_exception_ends_it():
    model = modules()

    def fail():
        with frozen_statistics(model) as training, RunningMeans(training).followed():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with frozen_statistics(model):
        assert (bias_gradient(model) > 1).all()
