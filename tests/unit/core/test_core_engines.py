"""Second-order engines: the right derivative, through every kernel, or a clear refusal."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradsigns_lightning.core.engines import DoubleBackward, make_engines
from gradsigns_lightning.core.frozen import frozen_statistics
from gradsigns_lightning.core.signature import input_gradients


class Smooth(nn.Module):
    """Small and smooth, with the layers that matter: convolution, batch norm, pooling, linear."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3 * 4, 4)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(F.avg_pool2d(F.softplus(self.norm(self.conv(x))), 2).flatten(1))


class Attention(nn.Module):
    """Rows of the image as tokens, by the fused kernel or by the module."""

    def __init__(self, fused: bool):
        super().__init__()
        torch.manual_seed(0)
        self.fused, self.attention, self.head = fused, nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        tokens = x.squeeze(1)
        mixed = (
            F.scaled_dot_product_attention(tokens, tokens, tokens)
            if self.fused
            else self.attention(tokens, tokens, tokens, need_weights=False)[0]
        )
        return self.head((tokens + mixed).mean(1))


def images(n=3, dtype=torch.float64):
    return torch.randn(n, 1, 6, 6, dtype=dtype, generator=torch.Generator().manual_seed(5))


def quadratic(gradients):
    weights = torch.linspace(-1, 1, gradients[0].numel(), dtype=gradients.dtype).view_as(gradients[0])
    mean = gradients.mean(0)
    return (weights * mean).sum() ** 2 + mean.square().sum()


def embed(model, x, objective=quadratic, target=1):
    with frozen_statistics(model):
        return DoubleBackward().embed(model, model, x, target, objective)


def test_the_input_gradient_is_that_of_minus_log_p():
    model, x = Smooth().double().eval(), images()
    logits = model(x.requires_grad_())
    expected = torch.autograd.grad(-F.softmax(logits, 1)[:, 1].log().sum(), x)[0]
    torch.testing.assert_close(input_gradients(model, x, 1), expected)


def test_the_parameter_gradient_agrees_with_finite_differences():
    model = Smooth().double().eval()
    x = images()
    embed(model, x).surrogate.backward()
    h = 1e-6
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        for i in range(0, flat.numel(), max(1, flat.numel() // 6)):
            before = flat[i].item()
            values = []
            for shift in (h, -h):
                flat[i] = before + shift
                values.append(embed(model, x).value.item())
            flat[i] = before
            expected = (values[0] - values[1]) / (2 * h)
            assert parameter.grad.view(-1)[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-9), (name, i)


@pytest.mark.parametrize("model", [Smooth().double().eval(), Attention(True).double()], ids=["conv", "attention"])
def test_gradcheck_through_the_input_gradient(model):
    names = [n for n, p in model.named_parameters() if "head" not in n or "bias" in n]
    parameters = [dict(model.named_parameters())[n].detach().clone().requires_grad_() for n in names]
    x = images(2)

    def value(*values):
        logits = lambda inputs: torch.func.functional_call(model, dict(zip(names, values, strict=True)), (inputs,))  # noqa: E731
        return DoubleBackward().embed(model, logits, x, 1, quadratic).surrogate

    assert torch.autograd.gradcheck(value, parameters, fast_mode=True)
    assert torch.autograd.gradgradcheck(value, parameters, fast_mode=True)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_attention_can_be_signed(fused, training):
    model = Attention(fused).train(training)
    embed(model, images(dtype=torch.float32)).surrogate.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert model.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    model, x = Smooth(), images(dtype=torch.float32)
    embed(model, x).surrogate.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = embed(model, x)
    assert loss.surrogate.dtype == torch.float32
    loss.surrogate.backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, grad)


def test_the_value_is_detached_and_equals_the_surrogate():
    loss = embed(Smooth(), images(dtype=torch.float32))
    assert not loss.value.requires_grad
    assert loss.value == loss.surrogate
    assert loss.surrogate.requires_grad


def test_the_task_keeps_its_own_gradients():
    model, x = Smooth(), images(dtype=torch.float32)
    x.requires_grad_()
    embed(model, x)
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())


class GraphDroppingCopy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0].T, None


def test_a_lost_graph_is_not_embedded_in_silence(monkeypatch):
    monkeypatch.setattr(
        "gradsigns_lightning.core.engines.double_backward.input_gradients", lambda *a, **k: torch.zeros(3, 1, 6, 6)
    )
    with pytest.raises(RuntimeError, match="carries no graph, so the watermark cannot be embedded"):
        embed(Smooth(), images(dtype=torch.float32))


def test_an_operation_without_second_derivative_is_an_error():
    weight = nn.Parameter(torch.randn(36, 4))
    model = nn.Module()
    model.weight = weight
    with pytest.raises(RuntimeError, match=r"once_differentiable|carries no graph"):
        DoubleBackward().embed(
            model, lambda x: GraphDroppingCopy.apply(x.flatten(1), weight), images(dtype=torch.float32), 1, quadratic
        ).surrogate.backward()


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (lambda x: x.flatten(1).sum(1), r"`logits` must be a tensor of shape \(3, n_classes\), got shape \(3,\).*Override"),
        (lambda x: x.flatten(1)[:2, :4], r"shape \(3, n_classes\), got shape \(2, 4\)"),
        (lambda x: x, r"got shape \(3, 1, 6, 6\)"),
        (lambda x: (x.flatten(1),), "got a tuple"),
        (lambda x: None, "got a NoneType"),
        (lambda x: x.flatten(1)[:, :2], "`target_class` must be below the number of classes 2, got 2"),
        (lambda x: x.flatten(1)[:, :1], "`logits` must have one column per class, at least 2, got 1"),
        (lambda x: x.flatten(1).long(), "`logits` must depend on the images through differentiable operations"),
        (lambda x: x.flatten(1).detach(), "`logits` must depend on the images through differentiable operations"),
        (lambda x: torch.ones(3, 5, requires_grad=True), "`logits` must depend on the images through differentiable operations"),
        (lambda x: (x.flatten(1) > 0).float(), "`logits` must depend on the images through differentiable operations"),
    ],
    ids=range(11),
)
def test_other_answers_than_logits_are_refused(logits, message):
    with pytest.raises(ValueError, match=message):
        input_gradients(logits, images(), 2)


def test_engines_by_name():
    own = DoubleBackward()
    assert [engine.name for engine in make_engines("double_backward")] == ["double_backward"]
    assert [engine.name for engine in make_engines("auto")] == ["double_backward", "forward_over_reverse", "finite_difference"]
    assert make_engines(own) == (own,)
    with pytest.raises(ValueError, match=r"`engine` must be one of \['auto', 'double_backward', .*\], got 'magic'"):
        make_engines("magic")
