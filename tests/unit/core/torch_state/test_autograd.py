"""What autograd lacks: derivatives inside modes, suspended hooks, known gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradsigns_lightning.core.torch_state.autograd import (
    derivative,
    graph_nodes,
    hooks_set_aside,
    with_gradients,
)
from gradsigns_lightning.core.torch_state.contexts import Replaced


def test_checkpointed_activations_are_computed_again_within_the_mode():
    calls = []

    def noted(x, inplace):
        calls.append(1)
        return torch.tanh(x)

    x = torch.rand(3, requires_grad=True)
    with Replaced({F.silu: noted}):
        (given,) = derivative(checkpoint(lambda x: F.silu(x) * 2, x, use_reentrant=False).sum(), [x])
    assert len(calls) == 2
    torch.testing.assert_close(given, 2 * (1 - x.detach().tanh().square()))


def test_what_a_value_does_not_depend_on_has_no_derivative():
    x, y = torch.rand(2, requires_grad=True).unbind()
    given = derivative(x.square(), [x, y], create_graph=True)
    assert given[1] is None
    torch.testing.assert_close(derivative(given[0], [x])[0], torch.tensor(2.0))


@pytest.mark.parametrize("raising", [False, True])
def test_hooks_are_set_aside_and_come_back(raising):
    x, calls = torch.ones((), requires_grad=True), []
    x.register_hook(lambda gradient: calls.append(float(gradient)))
    try:
        with hooks_set_aside([x, torch.ones((), requires_grad=True)]):
            derivative(x * 3, [x])
            if raising:
                raise KeyError
    except KeyError:
        assert raising
    assert calls == []
    (x * 5).backward()
    assert calls == [5.0]


def test_known_gradients_are_handed_out_as_the_loss_is_scaled():
    weight, bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    loss = with_gradients(torch.tensor(7.0), {weight: torch.tensor([1.0, 2.0])})
    assert float(loss.detach()) == 7
    (3 * loss + bias.sum()).backward()
    assert weight.grad.tolist() == [3, 6]
    assert bias.grad.tolist() == [1, 1]


def test_every_node_of_a_graph_is_met_once():
    x = torch.rand(2, requires_grad=True)
    y = x.exp()
    names = [node.name() for node in graph_nodes((y * y).sum())]
    assert sorted(names) == [
        "ExpBackward0",
        "MulBackward0",
        "SumBackward0",
        "torch::autograd::AccumulateGrad",
    ]
    assert list(graph_nodes(torch.ones(2))) == []
