"""The tensor that carries the mark, in full precision: the network's input or a layer's output."""

import pytest
import torch
from torch import nn

from gradsigns_lightning import WatermarkKey, verify
from gradsigns_lightning.core.engines import DoubleBackward, FiniteDifference, ForwardOverReverse
from gradsigns_lightning.core.inputs import carrier_inputs
from gradsigns_lightning.core.signature import input_gradients

TOKENS = torch.randint(1, 50, (6, 5), generator=torch.Generator().manual_seed(0))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mix, self.head = nn.Embedding(50, 4), nn.Linear(20, 16), nn.Linear(16, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.mix((self.embedding(ids) * (ids != 0).unsqueeze(-1)).flatten(1))))


def test_the_layers_output_takes_the_inputs_place():
    model = Text()
    carriers, logits = carrier_inputs(model, model, TOKENS, (1, 5, 4), "embedding")
    torch.testing.assert_close(carriers, model.embedding(TOKENS).detach())
    assert not carriers.requires_grad
    torch.testing.assert_close(logits(carriers), model(TOKENS))
    doubled = logits(torch.cat([carriers, carriers + 1]))
    torch.testing.assert_close(doubled[:6], model(TOKENS))
    assert not torch.allclose(doubled[6:], model(TOKENS))
    assert not model.embedding._forward_hooks


def test_a_mask_in_the_model_masks_the_gradient():
    model, ids = Text(), TOKENS.clone()
    ids[:, 3:] = 0
    carriers, logits = carrier_inputs(model, model, ids, (1, 5, 4), "embedding")
    gradient = input_gradients(logits, carriers, 1)
    assert gradient[:, :3].any()
    assert not gradient[:, 3:].any()


@pytest.mark.parametrize("engine", [DoubleBackward, ForwardOverReverse, FiniteDifference])
def test_every_engine_differentiates_at_a_layer(engine):
    model = Text()
    carriers, logits = carrier_inputs(model, model, TOKENS, (1, 5, 4), "embedding")
    gradients = []
    for make in (DoubleBackward, engine):
        loss = make().embed(model, logits, carriers, 1, lambda g: g.mean(0).square().sum()).surrogate
        gradients.append(torch.autograd.grad(loss, model.mix.weight)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (
            "embeding",
            (1, 5, 4),
            r"`carrier_layer` must name a submodule \(embeddings here: "
            r"\['embedding'\]\), got 'embeding'",
        ),
        ("", (1, 5, 4), "got ''"),
        (
            "embedding",
            (1, 5, 3),
            r"as many values per sample as the key's `input_shape` \(1, 5, 3\), got outputs of shape \[\(6, "
            r"5, 4\)\]",
        ),
        ("unused", (1, 5, 4), r"got outputs of shape \[\]"),
    ],
)
def test_other_layers_are_refused(layer, shape, message):
    model = Text()
    model.unused = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=message):
        carrier_inputs(model, model, TOKENS, shape, layer)
    assert not model.embedding._forward_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_differentiated_through(dtype):
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        .to(dtype)
        .eval()
    )
    wide = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).eval()
    wide.load_state_dict(model.state_dict())
    x = torch.randn(4, 1, 4, 4, dtype=dtype)
    inputs, logits = carrier_inputs(model, model, x, (1, 4, 4), None)
    assert inputs.dtype == logits(inputs).dtype == torch.float32
    torch.testing.assert_close(logits(inputs), wide(x.float()))
    logits(inputs).sum().backward()
    assert all(parameter.is_leaf and parameter.dtype == dtype for parameter in model.parameters())
    assert model[1].weight.grad.dtype == dtype
    assert model[1].weight.grad.any()
    assert torch.get_default_dtype() == torch.float32
    assert next(model.parameters()).dtype == dtype


def test_tensors_that_are_made_on_the_way_are_float32_too():
    class Makes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 3)

        def forward(self, x):
            return self.linear(x.flatten(1)) + torch.ones(3)

    model = Makes().bfloat16()
    torch.set_default_dtype(torch.bfloat16)
    try:
        _, logits = carrier_inputs(model, model, torch.randn(2, 1, 4, 4), (1, 4, 4), None)
        assert logits(torch.randn(2, 1, 4, 4, dtype=torch.float32)).dtype == torch.float32
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_verify_reads_at_a_layer_and_checks_it():
    key = WatermarkKey.generate("Acme Vision", 8, input_shape=(1, 5, 4), n_carriers=16, target_class=1)
    model = Text()
    ids = TOKENS.repeat(10, 1)
    with pytest.warns(UserWarning, match="classifies only"):
        result = verify(model, key, ids, carrier_layer="embedding")
    assert result.n_queries == 60
    with pytest.raises(ValueError, match="`carrier_layer` must name a submodule"):
        verify(model, key, ids, carrier_layer="embed")


def test_a_layer_is_found_in_a_network_that_ran_compiled():
    """Compiled code does not call hooks that were added later."""
    model, plain = torch.compile(Text(), backend="eager").eval(), Text()
    with torch.no_grad():
        model(TOKENS)
    carriers, _ = carrier_inputs(model, model, TOKENS, (1, 5, 4), "_orig_mod.embedding")
    torch.testing.assert_close(carriers, plain.embedding(TOKENS).detach())


def test_autocast_does_not_round_the_carriers():
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        carriers, _ = carrier_inputs(model, model, x, (1, 5, 4), "0")
    assert torch.equal(carriers, model[0](x))
