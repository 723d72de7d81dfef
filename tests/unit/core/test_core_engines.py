"""Second-order engines return the right derivative with every kernel, or refuse clearly."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradsigns_lightning.core.engines import (
    DoubleBackward,
    FiniteDifference,
    ForwardOverReverse,
    check_engine,
    differentiated,
    make_engines,
)
from gradsigns_lightning.core.signature import input_gradients
from gradsigns_lightning.core.torch_state.contexts import frozen_statistics
from gradsigns_lightning.core.torch_state.running_mean import RunningMeans


class Smooth(nn.Module):
    """A small smooth network with the layers that matter: convolution, batch norm, pooling, linear."""

    def __init__(self, between=None):
        super().__init__()
        torch.manual_seed(0)
        self.between = between or nn.Identity()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3 * 4, 4)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(F.avg_pool2d(F.softplus(self.norm(self.between(self.conv(x)))), 2).flatten(1))


class Attention(nn.Module):
    """Attention over the rows of the image, by the fused kernel or by the module."""

    def __init__(self, fused: bool):
        super().__init__()
        torch.manual_seed(0)
        self.fused, self.attention, self.head = (
            fused,
            nn.MultiheadAttention(6, 2, batch_first=True),
            nn.Linear(6, 3),
        )

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


def embed(model, x, objective=quadratic, target=1, engine=None):
    with frozen_statistics(model) as training, RunningMeans(training).followed():
        return (engine or DoubleBackward()).embed(model, model, x, target, objective)


def parameter_gradient(model, x, engine):
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(embed(model, x, engine=engine).surrogate, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for g, p in zip(gradients, parameters, strict=True)
        ]
    )


class Normalized(nn.Module):
    """Convolutions around a normalization layer and an activation."""

    def __init__(self, norm, activation):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), norm(), activation(), nn.Conv2d(4, 4, 3), activation())
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = layer(6, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.layer(x.squeeze(1))[0][:, -1])


def with_weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.conv)
    return model


class Checkpointed(nn.Module):
    """Batch norms whose convolution is in the same checkpointed region, before it, or in none."""

    def __init__(self, regions):
        super().__init__()
        torch.manual_seed(0)
        self.regions = regions
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        for start, end in itertools.pairwise(self.regions):
            x = checkpoint(self.body[start:end], x, use_reentrant=False)
        return self.head(self.body[self.regions[-1] :](x).tanh().flatten(1))


class OneByOne(Smooth):
    """A network whose convolution gets images without a batch dimension."""

    def forward(self, x):
        return self.head(
            F.avg_pool2d(self.norm(torch.stack([self.conv(image) for image in x])), 2).tanh().flatten(1)
        )


NETS = {
    "conv": Smooth,
    "images one by one": OneByOne,
    "relu in place, batch norm": lambda: Normalized(
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(4)), nn.ReLU
    ),
    "weight norm, batch norm": lambda: with_weight_norm(Smooth()),
    "batch norm, relu": lambda: Normalized(lambda: nn.BatchNorm2d(4), nn.ReLU),
    "group norm, relu": lambda: Normalized(lambda: nn.GroupNorm(2, 4), nn.ReLU),
    "layer norm, gelu": lambda: Normalized(lambda: nn.LayerNorm([4, 4, 4]), nn.GELU),
    "layer norm without weights": lambda: Normalized(
        lambda: nn.LayerNorm(4, elementwise_affine=False), nn.SiLU
    ),
    "instance norm, tanh": lambda: Normalized(lambda: nn.InstanceNorm2d(4), nn.Tanh),
    "instance norm with weights": lambda: Normalized(lambda: nn.InstanceNorm2d(4, affine=True), nn.Tanh),
    "instance norm with running statistics": lambda: Normalized(
        lambda: nn.InstanceNorm2d(4, track_running_stats=True), nn.Tanh
    ),
    "rms norm": lambda: Normalized(lambda: nn.RMSNorm([4, 4, 4]), nn.GELU),
    "max pooling": lambda: Normalized(lambda: nn.MaxPool2d(3, stride=1, padding=1), nn.ReLU),
    "fused attention": lambda: Attention(True),
    "multi-head attention": lambda: Attention(False),
    "GRU": lambda: Recurrent(nn.GRU),
}
SMOOTH = [name for name in NETS if "relu" not in name and "pooling" not in name]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("net", NETS)
def test_forward_over_reverse_equals_double_backward(net, dtype, tolerance):
    model, x = NETS[net]().to(dtype), images(4, dtype)
    expected = parameter_gradient(model, x, DoubleBackward())
    assert (
        parameter_gradient(model, x, ForwardOverReverse()) - expected
    ).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("regions", [(0, 3, 5), (0, 1, 4, 5), (0, 5)], ids=["whole", "split", "one"])
def test_activations_that_are_computed_again_change_nothing(regions):
    x = images(4, torch.float32)
    model, twin = Checkpointed(regions), Checkpointed((0,))
    for network in (model, twin):
        with frozen_statistics(network) as training, RunningMeans(training).followed():
            assert check_engine(DoubleBackward(), network, network, x, 1, sharded=False) is None
            differentiated(embed(network, x).surrogate, network, length=torch.tensor(1.0)).backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize("engine", [DoubleBackward, ForwardOverReverse, FiniteDifference])
@pytest.mark.parametrize("layer", ["convolution", "linear"])
def test_what_batch_normalisation_takes_out_again_gets_no_mark(engine, layer):
    if layer == "convolution":
        model, x = Smooth().double(), images(4)
        bias = model.conv.bias
        model.conv.weight.requires_grad_(False)
    else:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)
        ).double()
        bias, x = model[1].bias, images(4)
    embed(model, x, engine=engine()).surrogate.backward()
    largest = max(p.grad.abs().amax() for p in model.parameters() if p.grad is not None)
    assert bias.grad.abs().amax() < 1e-12 * largest


def test_the_norms_of_torch_itself_would_be_wrong(monkeypatch):
    """This shows that the test above can fail."""
    monkeypatch.setattr(
        "gradsigns_lightning.core.engines.forward_over_reverse._reversible_norms", contextlib.nullcontext
    )
    model, x = NETS["layer norm, gelu"](), images(4, torch.float32)
    expected = parameter_gradient(model, x, DoubleBackward())
    assert (parameter_gradient(model, x, ForwardOverReverse()) - expected).norm() > 1e-4 * expected.norm()


@pytest.mark.parametrize("net", SMOOTH)
def test_finite_differences_are_close_on_smooth_networks(net):
    model, x = NETS[net](), images(4, torch.float32)
    expected = parameter_gradient(model, x, DoubleBackward())
    assert (parameter_gradient(model, x, FiniteDifference()) - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("engine", [ForwardOverReverse, FiniteDifference])
def test_the_other_engines_have_the_same_value(engine):
    model, x = NETS["conv"](), images(4, torch.float32)
    loss = embed(model, x, engine=engine())
    torch.testing.assert_close(loss.value, embed(model, x).value)
    assert loss.value == loss.surrogate
    assert not loss.value.requires_grad


@pytest.mark.parametrize("factor", [1.0, 65536.0])
def test_a_differentiated_loss_hands_out_the_same_gradients_scaled_as_the_task_scales(factor):
    model, x = Smooth(), images(4, torch.float32)
    model.unused = nn.Linear(2, 2)
    expected = parameter_gradient(model, x, DoubleBackward())
    loss = embed(model, x).surrogate
    given = differentiated(loss, model, length=0.5 * expected.norm())
    torch.testing.assert_close(given, 0.5 * loss)
    (factor * given).backward()
    assert model.unused.weight.grad is None
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    torch.testing.assert_close(torch.cat([g.flatten() for g in gradients]), factor * 0.5 * expected)


def test_a_differentiated_loss_adds_to_the_task_s_gradients():
    model, x = Smooth().eval(), images(4, torch.float32)
    length = parameter_gradient(model, x, DoubleBackward()).norm()
    model.zero_grad()
    task = lambda: model(x).square().mean()  # noqa: E731
    (task() + embed(model, x).surrogate).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (task() + differentiated(embed(model, x).surrogate, model, length=length)).backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.parametrize("engine", [DoubleBackward, ForwardOverReverse, FiniteDifference])
def test_a_satisfied_objective_changes_nothing(engine):
    model = NETS["conv"]()
    with frozen_statistics(model):
        loss = engine().embed(model, model, images(3, torch.float32), 1, lambda g: F.relu(g.sum() - 1e9))
    loss.surrogate.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("engine", [DoubleBackward, ForwardOverReverse, FiniteDifference])
def test_black_images_have_a_derivative_too(engine):
    gradient = parameter_gradient(NETS["conv"](), torch.zeros(3, 1, 6, 6), engine())
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("engine", [DoubleBackward, ForwardOverReverse])
def test_compiled_networks_are_differentiated_uncompiled(engine):
    x = images(3, torch.float32)
    expected = parameter_gradient(NETS["conv"]().eval(), x, engine())
    compiled = torch.compile(NETS["conv"]().eval(), backend="aot_eager")
    compiled(x).sum().backward()  # compiled from here on
    torch.testing.assert_close(parameter_gradient(compiled, x, engine()), expected)


def test_the_input_gradient_is_that_of_minus_log_p():
    model, x = Smooth().double().eval(), images()
    logits = model(x.requires_grad_())
    expected = torch.autograd.grad(-F.softmax(logits, 1)[:, 1].log().sum(), x)[0]
    torch.testing.assert_close(input_gradients(model, x, 1), expected)


def norm_frozen(model):
    model.norm.eval()
    return model


@pytest.mark.parametrize(
    ("model", "follows"),
    [(Smooth(), True), (Smooth(nn.Softplus()), False), (norm_frozen(Smooth()), False)],
    ids=["batch norm", "another layer between", "frozen by the user"],
)
def test_the_parameter_gradient_agrees_with_finite_differences(model, follows):
    model = model.double()
    x = images()
    embed(model, x).surrogate.backward()
    channel_means = lambda: model.conv(x).mean((0, 2, 3)).detach()  # noqa: E731
    running_mean, start = model.norm.running_mean.clone(), channel_means()
    h = 1e-6
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        for i in range(0, flat.numel(), max(1, flat.numel() // 6)):
            before = flat[i].item()
            values = []
            for shift in (h, -h):
                flat[i] = before + shift
                if follows:
                    model.norm.running_mean.copy_(running_mean + channel_means() - start)
                values.append(embed(model, x).value.item())
            flat[i] = before
            expected = (values[0] - values[1]) / (2 * h)
            assert parameter.grad.view(-1)[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-9), (name, i)


@pytest.mark.parametrize(
    "model", [Smooth().double().eval(), Attention(True).double()], ids=["conv", "attention"]
)
def test_gradcheck_through_the_input_gradient(model):
    names = [n for n, p in model.named_parameters() if "head" not in n or "bias" in n]
    parameters = [dict(model.named_parameters())[n].detach().clone().requires_grad_() for n in names]
    x = images(2)

    def value(*values):
        def logits(inputs):
            return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (inputs,))

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
        "gradsigns_lightning.core.engines.double_backward.input_gradients",
        lambda *a, **k: torch.zeros(3, 1, 6, 6),
    )
    with pytest.raises(RuntimeError, match="carries no graph, so the watermark cannot be embedded"):
        embed(Smooth(), images(dtype=torch.float32))


def test_an_operation_without_second_derivative_is_an_error():
    weight = nn.Parameter(torch.randn(36, 4))
    model = nn.Module()
    model.weight = weight
    with pytest.raises(RuntimeError, match=r"once_differentiable|carries no graph"):
        DoubleBackward().embed(
            model,
            lambda x: GraphDroppingCopy.apply(x.flatten(1), weight),
            images(dtype=torch.float32),
            1,
            quadratic,
        ).surrogate.backward()


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (
            lambda x: x.flatten(1).sum(1),
            r"`logits` must be a tensor of shape \(3, n_classes\), got shape "
            r"\(3,\).*Override",
        ),
        (lambda x: x.flatten(1)[:2, :4], r"shape \(3, n_classes\), got shape \(2, 4\)"),
        (lambda x: x, r"got shape \(3, 1, 6, 6\)"),
        (lambda x: (x.flatten(1),), "got a tuple"),
        (lambda x: None, "got a NoneType"),
        (lambda x: x.flatten(1)[:, :2], "`target_class` must be below the number of classes 2, got 2"),
        (lambda x: x.flatten(1)[:, :1], "`logits` must have one column per class, at least 2, got 1"),
        (
            lambda x: x.flatten(1).long(),
            "`logits` must depend on the images through differentiable operations",
        ),
        (
            lambda x: x.flatten(1).detach(),
            "`logits` must depend on the images through differentiable operations",
        ),
        (
            lambda x: torch.ones(3, 5, requires_grad=True),
            "`logits` must depend on the images through differentiable operations",
        ),
        (
            lambda x: (x.flatten(1) > 0).float(),
            "`logits` must depend on the images through differentiable operations",
        ),
    ],
    ids=range(11),
)
def test_other_answers_than_logits_are_refused(logits, message):
    with pytest.raises(ValueError, match=message):
        input_gradients(logits, images(), 2)


def test_engines_by_name():
    own = DoubleBackward()
    assert [engine.name for engine in make_engines("double_backward")] == ["double_backward"]
    assert [engine.name for engine in make_engines("auto")] == [
        "double_backward",
        "forward_over_reverse",
        "finite_difference",
    ]
    assert make_engines(own) == (own,)
    with pytest.raises(
        ValueError,
        match=r"`engine` must be one of \['auto', 'double_backward', .*\], got "
        r"'magic'",
    ):
        make_engines("magic")


class Directions(nn.Module):
    """A network that divides by a norm, which is zero for a blank image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(1, 3, 3, bias=False), nn.Linear(48, 4)

    def forward(self, x):
        return self.head(F.normalize(self.conv(x), dim=1).flatten(1))


@pytest.mark.parametrize("blank", [True, False])
def test_a_non_finite_gradient_does_no_harm(blank):
    model, x = Directions(), images(4, torch.float32)
    x[1] *= not blank
    loss = differentiated(embed(model, x).surrogate, model, length=torch.tensor(1.0))
    assert bool(loss.isnan()) == blank
    (model(x).square().mean() + loss.nan_to_num(nan=0.0)).backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().mean().backward()
    assert all(g.isfinite().all() for g in together)
    assert all(torch.equal(g, p.grad) for g, p in zip(together, model.parameters(), strict=True)) == blank


def test_hooks_of_parameters_see_the_sum_only():
    model, x = Smooth(), images(4, torch.float32)
    expected, calls = parameter_gradient(model, x, DoubleBackward()), []

    def tenth(gradient):
        calls.append(gradient)
        return gradient / 10

    for parameter in model.parameters():
        parameter.register_hook(tenth)
    loss = differentiated(embed(model, x).surrogate, model, length=expected.norm())
    assert not calls
    loss.backward()
    gradients = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )
    torch.testing.assert_close(gradients, expected / 10)


def test_a_network_may_change_its_input_in_place():
    model, x = NETS["conv"]().eval(), images(3, torch.float32)
    expected = input_gradients(lambda inputs: model(inputs - 0.5), x, 1)
    before = x.clone()
    assert torch.equal(input_gradients(lambda inputs: model(inputs.sub_(0.5)), x, 1), expected)
    assert torch.equal(x, before)


def test_sparse_gradients_are_handed_out_as_they_are():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.head = nn.Embedding(9, 36, sparse=True), nn.Linear(36, 4)

        def forward(self, x):
            return self.head(torch.tanh(x.flatten(1) * self.words(torch.arange(len(x)))))

    model, x = Words(), images(3, torch.float32)
    differentiated(embed(model, x).surrogate, model, length=torch.tensor(1.0)).backward()
    assert model.words.weight.grad.is_sparse
    assert model.words.weight.grad.to_dense()[:3].any()
