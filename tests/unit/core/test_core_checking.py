"""What is found out about an engine and a model from a few images before training."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.core import EmbeddingSettings, Watermarker
from gradsigns_lightning.core.engines import (
    DoubleBackward,
    FiniteDifference,
    ForwardOverReverse,
    check_engine,
)
from gradsigns_lightning.core.torch_state.contexts import frozen_statistics

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
KEY = WatermarkKey.generate("Acme Vision", 8, input_shape=(1, 8, 8), target_class=1)


def net(activation=nn.ReLU, width=64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width),
        activation(),
        nn.Linear(width, width),
        activation(),
        nn.Linear(width, 4),
    )


def problem(engine, model, logits=None, *, sharded=False):
    with frozen_statistics(model):
        return check_engine(engine, model, logits or model, IMAGES, 1, sharded=sharded)


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(
    ("engine", "activation"),
    [
        *((DoubleBackward, a) for a in (nn.ReLU, nn.GELU)),
        *((ForwardOverReverse, a) for a in (nn.ReLU, nn.GELU)),
        *((FiniteDifference, a) for a in (nn.GELU, nn.Tanh, nn.SiLU, nn.Softplus)),
    ],
)
def test_what_works_passes(engine, activation, sharded):
    model = net(activation)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert problem(engine(), model, sharded=sharded) is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def with_function(function):
    model = net(nn.Identity)
    return model, lambda x: model[5](function(model[3](function(model[1](x.flatten(1))))))


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (F.relu, "Relu"),
        (torch.Tensor.relu_, "Relu"),
        (nn.LeakyReLU(), "LeakyRelu"),
        (nn.PReLU(), "PreluKernel"),
        (F.relu6, "Hardtanh"),
        (F.hardswish, "Hardswish"),
        (F.hardshrink, "Hardshrink"),
        (lambda x: F.threshold(x, 0.1, 0.0), "Threshold"),
        (lambda x: F.max_pool2d(x.view(-1, 1, 8, 8), 3, 1, 1).flatten(1), "MaxPool2DWithIndices"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kinks_are_seen_also_where_no_module_tells_of_them(function, operation):
    assert f"the network has kinks ({operation})" in problem(FiniteDifference(), *with_function(function))


def test_a_kink_that_no_image_crosses_is_seen():
    model = net(nn.GELU)
    assert "has kinks (Relu)" in problem(FiniteDifference(), model, lambda x: F.relu(model(x) + 1000))


@pytest.mark.parametrize(
    "function", [torch.abs, lambda x: x.clamp(min=0), lambda x: torch.maximum(x, -x / 2)]
)
def test_kinks_without_a_name_are_seen_by_their_effect(function):
    assert "finite differences of two step sizes differ by" in problem(
        FiniteDifference(), *with_function(function)
    )


def test_a_forward_rule_that_forgets_a_dependence_is_seen(monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))
    assert problem(ForwardOverReverse(), model) is None
    monkeypatch.setattr(
        "gradsigns_lightning.core.engines.forward_over_reverse._reversible_norms", contextlib.nullcontext
    )
    assert "cannot be differentiated again (asymmetry" in problem(ForwardOverReverse(), model)


class Norm(nn.Module):
    def forward(self, x):
        return (x - x).flatten(1).norm(dim=1, keepdim=True) + x.flatten(1)[:, :4] * self.scale

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


def test_a_second_derivative_that_is_not_finite():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 4)

        def forward(self, x):
            return (self.linear(x.flatten(1)) * 0).abs().sqrt() + self.linear(x.flatten(1))

    assert "not finite" in problem(DoubleBackward(), Root())


def test_no_parameter_is_reached():
    model = net()
    model.requires_grad_(False)
    model.extra = nn.Parameter(torch.ones(1))
    assert "reaches no trainable parameter" in problem(DoubleBackward(), model, lambda x: net(nn.GELU)(x))


def test_out_of_memory_is_not_a_property_of_the_model():
    def logits(x):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        problem(DoubleBackward(), net(), logits)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("When use_reentrant=True, x", "use_reentrant=False"),
        ("torch.compile with aot_autograd does not currently support double backward", "do not compile it"),
        (
            "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented",
            "fused attention",
        ),
        ("the derivative for '_cudnn_rnn_backward' is not implemented", "without cuDNN"),
        (
            "derivative for aten::my_op is not implemented",
            "has no second derivative (derivative for aten::my_op",
        ),
        ("something else\nin two lines", "something else"),
    ],
)
def test_messages_tell_what_to_do(message, words):
    def logits(x):
        raise RuntimeError(message)

    answer = problem(DoubleBackward(), net(), logits)
    assert words in answer
    assert "\n" not in answer


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


def prepare(model, logits=None, **settings):
    marker = Watermarker(KEY, EmbeddingSettings(**settings))
    marker.prepare(model, logits or model, IMAGES)
    return marker.engine.name


def test_auto_takes_the_first_engine_that_works():
    model = net(nn.GELU)
    assert prepare(model) == "double_backward"
    assert prepare(model, lambda x: model[3:](OnceOnly.apply(model[1](x.flatten(1))))) == "finite_difference"


def test_an_engine_that_was_asked_for_is_not_replaced():
    model = net(nn.GELU)
    assert prepare(model, engine="forward_over_reverse") == "forward_over_reverse"
    with pytest.raises(
        ValueError,
        match=r"cannot embed in this model:\n  - engine 'double_backward': .* "
        r"once_differentiable",
    ):
        prepare(model, lambda x: model[3:](OnceOnly.apply(model[1](x.flatten(1)))), engine="double_backward")


def test_other_answers_than_logits_are_the_users_error():
    with pytest.raises(ValueError, match="`logits` must be a tensor of shape"):
        prepare(net(), lambda x: F.relu(x))


class Kept(torch.autograd.Function):
    """A sine whose slope is differentiated as a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 3 * torch.cos(3 * x)
        return torch.sin(3 * x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope


class Saved(Kept):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(3 * x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 3 * torch.cos(3 * ctx.saved_tensors[0])


class KeptFloat32(Kept):
    @staticmethod
    def forward(ctx, x):
        if x.dtype != torch.float32:
            raise RuntimeError("not implemented for this dtype")
        return Kept.forward(ctx, x)


class SavedFloat32(Saved):
    @staticmethod
    def forward(ctx, x):
        if x.dtype != torch.float32:
            raise RuntimeError("not implemented for this dtype")
        return Saved.forward(ctx, x)


class KeptWeight(torch.autograd.Function):
    """A linear layer whose derivative with respect to its weight is differentiated as a constant."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight.detach()
        ctx.save_for_backward(x)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight, grad.T @ ctx.saved_tensors[0]


class Rounded(torch.autograd.Function):
    """Passes gradients straight through (deliberately wrong)."""

    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


def after_first_layer(function, activation=nn.Identity):
    model = net(activation)
    return model, lambda x: model[2:](function(model[1](x.flatten(1))))


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("function", [Kept, KeptWeight])
def test_a_custom_function_with_a_second_derivative_that_is_none_is_seen(function, activation):
    model, logits = after_first_layer(Kept.apply, activation)
    if function is KeptWeight:
        logits = lambda x: model[2:](KeptWeight.apply(x.flatten(1), model[1].weight))  # noqa: E731
    words = problem(DoubleBackward(), model, logits)
    assert f"a custom autograd function ({function.__name__}) has no exact second derivative" in words


def test_a_custom_function_for_one_dtype_is_seen():
    assert "KeptFloat32" in problem(DoubleBackward(), *after_first_layer(KeptFloat32.apply, nn.Tanh))


@pytest.mark.parametrize("function", [Saved, SavedFloat32, Rounded])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_custom_functions_that_can_be_differentiated_twice_pass(function, activation):
    assert problem(DoubleBackward(), *after_first_layer(function.apply, activation)) is None


def test_auto_goes_around_an_inexact_second_derivative_or_refuses():
    assert prepare(*after_first_layer(Kept.apply, nn.Tanh)) == "finite_difference"
    with pytest.raises(
        ValueError, match="custom autograd function \\(Kept\\) has no exact second derivative"
    ):
        prepare(*after_first_layer(Kept.apply, nn.ReLU))


def test_parameters_are_as_before_the_comparison():
    model, logits = after_first_layer(Kept.apply, nn.Tanh)
    before = {k: (v.dtype, v.clone()) for k, v in model.state_dict().items()}
    problem(DoubleBackward(), model, logits)
    assert all(
        v.dtype is before[k][0] and torch.equal(v, before[k][1]) for k, v in model.state_dict().items()
    )
    assert torch.get_default_dtype() is torch.float32


class KeptForward(Kept):
    """Has a forward-mode derivative with the same fault."""

    @staticmethod
    def forward(x):
        return torch.sin(3 * x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.slope = 3 * torch.cos(3 * inputs[0])

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.slope


class SavedForward(KeptForward):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * 3 * torch.cos(3 * ctx.saved_tensors[0])

    backward = Saved.backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(("function", "taken"), [(Kept, "finite_difference"), (Saved, "double_backward")])
def test_it_is_seen_in_every_precision(dtype, autocast, function, taken):
    model, logits = after_first_layer(function.apply, nn.Tanh)
    model.to(dtype)
    marker = Watermarker(KEY)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        marker.prepare(model, logits, IMAGES.to(dtype))
    assert marker.engine.name == taken
    assert all(v.dtype is dtype and torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("function", [KeptForward, SavedForward])
def test_with_sharded_parameters_it_is_said_that_it_cannot_be_seen(function):
    model, logits = after_first_layer(function.apply, nn.ReLU)
    with pytest.warns(
        UserWarning,
        match=rf"custom autograd functions \({function.__name__}\) have an exact "
        rf"second derivative",
    ):
        assert problem(ForwardOverReverse(), model, logits, sharded=True) is None
    found = problem(ForwardOverReverse(), model, logits)
    assert found is None if function is SavedForward else "KeptForward" in found


def test_first_derivatives_and_functions_of_sharding_need_no_such_warning(recwarn):
    hook = type("Hook", (SavedForward,), {"__module__": "torch.distributed.fsdp._fully_shard"})
    assert problem(ForwardOverReverse(), *after_first_layer(hook.apply), sharded=True) is None
    assert problem(FiniteDifference(), *after_first_layer(Kept.apply, nn.Tanh), sharded=True) is None
    assert problem(ForwardOverReverse(), net(), sharded=True) is None
    assert not recwarn
