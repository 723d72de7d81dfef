import pytest
import torch
from torch import nn

from gradsigns_lightning.core.torch_state.memory import saved_bytes
from gradsigns_lightning.models import SmallResNet


def test_what_a_pass_keeps_is_counted_once_and_without_weights():
    model = nn.Sequential(nn.Linear(10, 20), nn.Sigmoid(), nn.Linear(20, 5), nn.Tanh())
    images = torch.rand(7, 10, requires_grad=True)
    # the input, and the outputs of sigmoid and tanh; the sigmoid's is also an input
    needed = 4 * 7 * (10 + 20 + 5)
    assert saved_bytes(model, lambda: model(images)) == needed


def test_attention_counts_with_the_square_of_the_tokens():
    def kept(tokens):
        x = torch.rand(1, tokens, 8, requires_grad=True)
        return saved_bytes(nn.Identity(), lambda: torch.softmax(x @ x.transpose(1, 2), -1) @ x)

    assert 3.5 < (kept(512) - kept(256)) / (kept(256) - kept(128)) < 4.1


def test_on_the_meta_device_the_figure_is_the_same():
    def kept(device):
        with torch.device(device):
            model = SmallResNet(1, 10).eval()
            images = torch.ones(1, 1, 28, 28, requires_grad=True)
        return saved_bytes(model, lambda: model(images))

    assert kept("meta") == pytest.approx(kept("cpu"), rel=0.05)
    assert kept("meta") > 100_000


def test_nothing_is_kept_without_gradients():
    model = nn.Linear(10, 20)
    with torch.no_grad():
        assert saved_bytes(model, lambda: model(torch.rand(7, 10))) == 0
