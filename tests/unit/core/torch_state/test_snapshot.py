"""Passes have no side effects: on buffers, attributes, metrics, observers, hooks, random states."""

import random
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from gradsigns_lightning import WatermarkKey, verify, verify_api
from gradsigns_lightning.core.torch_state.contexts import frozen_statistics
from gradsigns_lightning.core.torch_state.snapshot import side_effects_undone

KEY = WatermarkKey.generate("Acme Vision", 8, input_shape=(1, 4, 4), target_class=1)
IMAGES = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings(
    "ignore:The model classifies only", "ignore:.*is deprecated:DeprecationWarning"
)


@dataclass
class Count:
    calls: int = 0


class Busy(nn.Module):
    """Changes everything that a forward pass can change, in training and in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 3)
        self.register_buffer("in_place", torch.zeros(3))
        self.register_buffer("behind", torch.zeros(3))
        self.register_buffer("anew", torch.zeros(3))
        self.register_buffer("resized", torch.zeros(3))
        self.register_buffer("none_yet", None)
        self.alias = self.in_place[:2]
        self.plain = torch.zeros(3)
        self.n_calls, self.last, self.queue = 0, None, deque([1], maxlen=3)
        self.history, self.counts, self.seen = [], {"calls": 0, "sum": torch.zeros(3)}, set()
        self.generator = torch.Generator().manual_seed(1)
        self.generators = [
            np.random.default_rng(2),
            np.random.RandomState(3),
            random.Random(4),
            random.SystemRandom(),
        ]
        self.record, self.space = Count(), SimpleNamespace(inner=Count())
        self.accuracy = MulticlassAccuracy(3)
        self.hidden = {"accuracy": MulticlassAccuracy(3)}

    def forward(self, x):
        logits = self.linear(x.flatten(1))
        answer = logits.detach()
        self.in_place += answer.sum(0)
        self.behind.data.add_(1)
        self.anew = self.anew + 1
        self.resized.resize_(5).fill_(7)
        self.none_yet = answer.mean(0)
        self.register_buffer("new", answer.sum(0))
        self.plain += 1
        self.n_calls, self.last, self.cached = self.n_calls + 1, logits, answer
        self.queue.append(self.n_calls)
        self.history.append(answer)
        self.counts["calls"] += 1
        self.counts["sum"] += 1
        self.seen.add(self.n_calls)
        self.record.calls += 1
        self.space.inner.calls += 1
        self.space.new = answer
        for metric in (self.accuracy, self.hidden["accuracy"]):
            metric.update(answer, torch.zeros(len(x), dtype=torch.long))
        noise = torch.randn(3, generator=self.generator) + torch.rand(3) + random.random() + np.random.rand()
        noise += sum(generator.normal() for generator in self.generators[:2]) + sum(
            g.random() for g in self.generators[2:]
        )
        return logits + 0.0 * noise


def state(model):
    attributes = vars(model).keys() - vars(nn.Module()).keys()
    tensors = {name: (id(b), b.tolist()) for name, b in model.named_buffers()} | {
        "alias": model.alias.tolist()
    }
    values = {name: repr(getattr(model, name)) for name in attributes}
    metrics = [
        (m._update_count, m.tp.tolist(), m.fn.tolist()) for m in (model.accuracy, model.hidden["accuracy"])
    ]
    generators = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    numpy_new, numpy_old, python, _ = model.generators
    own = (
        model.generator.get_state().tolist(),
        str(numpy_new.bit_generator.state),
        str(numpy_old.get_state()),
        python.getstate(),
    )
    return tensors, values, metrics, generators, own, "none_yet" in model._buffers


def test_a_plain_pass_is_seen():
    model = Busy()
    before = state(model)
    model(IMAGES)
    after = state(model)
    assert all(a != b for a, b in zip(before[:5], after[:5], strict=True))
    assert all(a != b for a, b in zip(before[4], after[4], strict=True))
    assert all(before[1][name] != after[1][name] for name in ("record", "space"))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("raising", [False, True])
def test_everything_is_restored(mode, raising):
    model = Busy()
    model(IMAGES)
    model.last, model.cached = None, None
    before = state(model)

    def use():
        with mode(), frozen_statistics(model):
            model(IMAGES)
            if raising:
                raise KeyError("user code")

    if raising:
        with pytest.raises(KeyError):
            use()
    else:
        use()
    assert state(model) == before
    model(IMAGES)  # the model still works


@pytest.mark.parametrize(
    "read", [lambda m: verify(m, KEY, IMAGES), lambda m: verify_api(m, KEY, IMAGES, max_queries=200)]
)
def test_reading_puts_all_back(read):
    model = Busy()
    before = state(model)
    read(model)
    assert state(model) == before


def test_tensors_that_a_graph_saved_stay_valid():
    model = Busy()
    weight = torch.ones(3, requires_grad=True)
    loss = (model.in_place * weight).sum()  # saves the buffer
    version = model.in_place._version
    with side_effects_undone(model):
        pass
    assert model.in_place._version == version
    loss.backward()


def test_large_parameters_are_not_copied(monkeypatch):
    model = nn.Linear(8, 8).requires_grad_(False)
    model.register_buffer("small", torch.zeros(2))
    copied = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t, **k: copied.append(t.shape) or clone(t, **k))
    with side_effects_undone(model):
        pass
    assert copied == [(2,)]


def test_backward_hooks_of_modules_are_not_called():
    model, calls = nn.Linear(4, 2), []
    model.register_full_backward_hook(lambda *args: calls.append(args))
    with side_effects_undone(model):
        model(torch.rand(3, 4)).sum().backward()
    assert not calls
    model(torch.rand(3, 4)).sum().backward()
    assert len(calls) == 1


def test_observers_of_quantisation_aware_training():
    quantization = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model.train(), inplace=True)
    model(IMAGES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with frozen_statistics(model):
        model(IMAGES * 100)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(IMAGES * 100)
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
