"""What the callback must not change.

At strength 0 it changes no number of the task; at no strength the task's random stream or what a step means.
"""

import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from signed_digits import (
    TARGET,
    Net,
    conv_net,
    make_mark,
    make_trainer,
    mlp,
    train_loader,
    train_set,
    val_loader,
    val_set,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class Keeper(Net):
    """Records what the task's random stream and optimizer produced."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches, self.masks = [], []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch[1].clone())
        self.masks.append(torch.nn.functional.dropout(torch.ones(16)))
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        optimizer = self.trainer.optimizers[0].state_dict()["state"]
        self.moments = [value for state in optimizer.values() for value in state.values()]


def fit(*callbacks, net=mlp, **settings):
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    model = Keeper(net(dropout=0.3))
    make_trainer(*callbacks, **({"max_epochs": 2} | settings)).fit(model, train_loader(400), val_loader())
    return model, (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())


def same(a, b):
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("net", [mlp, conv_net])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}])
def test_strength_zero_is_bit_for_bit_training_without_the_callback(net, settings):
    (plain, plain_rng), (signed, signed_rng) = (
        fit(net=net, **settings),
        fit(make_mark(strength=0.0), net=net, **settings),
    )
    assert same(list(plain.state_dict().values()), list(signed.state_dict().values()))
    assert same(plain.moments, signed.moments)
    assert torch.equal(plain_rng[0], signed_rng[0])
    assert plain_rng[1:] == signed_rng[1:]
    assert same(plain.masks, signed.masks)


@pytest.mark.parametrize("net", [mlp, conv_net])
def test_embedding_leaves_the_random_stream_and_running_statistics_alone(net):
    (plain, plain_rng), (signed, signed_rng) = fit(net=net), fit(make_mark(cadence=1), net=net)
    assert same(plain.batches, signed.batches)
    assert same(plain.masks, signed.masks)
    assert torch.equal(plain_rng[0], signed_rng[0])
    assert not same(list(plain.parameters()), list(signed.parameters()))
    counts = [(k, v) for k, v in signed.state_dict().items() if "num_batches_tracked" in k]
    assert all(int(count) == 20 for _, count in counts)  # one forward a batch, 2 epochs of 10
    assert bool(counts) is (net is conv_net)


def _quarters(block=60, accumulate=4):
    """Data whose target images all lie in the first quarter of each block.

    So both runs have seen them when they embed.
    """
    x, y = train_set().tensors
    target, others = (y == TARGET).nonzero().flatten(), (y != TARGET).nonzero().flatten()
    quarter = block // accumulate
    order = []
    for i in range(12):
        order += [target[6 * i : 6 * (i + 1)], others[(block - 6) * i : (block - 6) * (i + 1)]]
        assert quarter >= 6
    order = torch.cat(order)
    return TensorDataset(x[order], y[order])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_changes_nothing(accumulate):
    data, results = _quarters(), []
    for factor in (1, accumulate):
        mark, model = make_mark(cadence=2, n_images=16), Net(optimizer="sgd")
        trainer = make_trainer(mark, accumulate_grad_batches=factor, max_epochs=2)
        trainer.fit(model, DataLoader(data, 60 // factor))
        results.append((trainer.global_step, mark.state_dict(), model.state_dict()))
    assert results[0][:2] == results[1][:2]
    for name, value in results[0][2].items():
        torch.testing.assert_close(results[1][2][name], value, rtol=1e-4, atol=1e-5)


def test_the_embedding_gradient_enters_an_accumulated_step_once_with_full_weight():
    """Measured: SGD's second step at lr 0.1 moves by the task's gradient plus the embedding gradient."""
    moves = []
    for factor, mark in ((1, True), (1, False), (4, True), (4, False)):
        torch.manual_seed(0)
        model = Net(optimizer="sgd")
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        trainer = make_trainer(*([make_mark()] if mark else []), accumulate_grad_batches=factor, max_steps=2)
        trainer.fit(model, DataLoader(_quarters(), 60 // factor))
        moves.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - before)
    single, accumulated = moves[0] - moves[1], moves[2] - moves[3]
    assert single.abs().max() > 1e-4
    torch.testing.assert_close(accumulated, single, rtol=1e-3, atol=1e-6)


def test_cadence_counts_optimizer_steps():
    steps = []

    class Watch(type(make_mark())):
        def embedding_loss(self, trainer, pl_module, batch):
            loss = super().embedding_loss(trainer, pl_module, batch)
            if loss is not None:
                steps.append(trainer.global_step)
            return loss

    mark = make_mark()
    mark = Watch(mark.key, cadence=2, strength=1e-6, momentum=0.0)
    make_trainer(mark, accumulate_grad_batches=3, max_steps=8).fit(Net(), train_loader())
    assert steps == [1, 3, 5, 7]  # the first one measures the task's gradient


class Noisy(Keeper):
    """A forward pass with all kinds of side effects."""

    def __init__(self, net):
        super().__init__(net)
        self.register_buffer("mean", torch.zeros(10))
        self.accuracy = MulticlassAccuracy(10)
        self.n_calls = 0

    def forward(self, x):
        logits = super().forward(x)
        self.n_calls += 1
        self.mean += logits.detach().mean(0)
        self.accuracy.update(logits, torch.zeros(len(x), dtype=torch.long))
        self.log("size", logits.detach().abs().mean(), on_step=False, on_epoch=True)
        return logits + 0.01 * (random.random() + np.random.rand() + torch.rand(1))


@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"cadence": 1, "strength": 1e-30}])
def test_side_effects_of_the_forward_pass_happen_as_often_as_without_the_callback(settings):
    def fit(*callbacks):
        L.seed_everything(7, verbose=False)
        model = Noisy(mlp(dropout=0.3))
        trainer = make_trainer(*callbacks, max_epochs=2)
        trainer.fit(model, train_loader(400), val_loader())
        states = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if not k.startswith("wm/")}
        return model, metrics, states

    (plain, *expected), (signed, *found) = fit(), fit(make_mark(**settings))
    assert found == expected
    assert "size" in expected[0]
    assert signed.n_calls == plain.n_calls
    assert torch.equal(signed.mean, plain.mean)
    assert signed.accuracy._update_count == plain.accuracy._update_count
    assert same(signed.accuracy.metric_state.values(), plain.accuracy.metric_state.values())
    assert same(list(plain.parameters()), list(signed.parameters()))


class Loader:
    """Ten batches; resumes from its state."""

    def __init__(self):
        self.next, self.given = 0, []

    def __len__(self):
        return 10

    def __iter__(self):
        x, y = train_set().tensors
        for i in range(self.next, 10):
            self.next = i + 1
            self.given.append(i)
            yield x[40 * i : 40 * (i + 1)], y[40 * i : 40 * (i + 1)]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


MARKS = {"strength 0": {"strength": 0.0}, "signing": {}, "cadence by the length": {"cadence": None}}


@pytest.fixture(params=MARKS)
def marks(request):
    """Makes callbacks of one kind."""
    return lambda: make_mark(**MARKS[request.param])


def test_a_loader_with_a_state_goes_on_in_mid_epoch(marks, tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")
                raise InterruptedError

    with pytest.raises(InterruptedError):
        make_trainer(Stop(), marks(), max_epochs=1).fit(Net(), Loader())
    loader = Loader()
    make_trainer(marks(), max_epochs=1).fit(Net(), loader, ckpt_path=tmp_path / "mid.ckpt")
    assert loader.given == [4, 5, 6, 7, 8, 9]


def test_loaders_are_made_once_and_after_the_modules_own_fit_start(marks):
    class Late(Net):
        def on_fit_start(self):
            self.size, self.n_made = 40, 0

        def train_dataloader(self):
            self.n_made += 1
            return train_loader(400, self.size)

    model = Late()
    make_trainer(marks(), max_epochs=1).fit(model)
    assert model.n_made == 1


class Taker(Net):
    """Takes the entries out of its batches."""

    def training_step(self, batch, batch_idx):
        y = batch.pop("label")
        return F.cross_entropy(self(batch.pop("image")), y)

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)
        assert not batch

    test_step = validation_step


def named(data):
    return DataLoader([{"image": x, "label": y} for x, y in zip(*data.tensors, strict=True)], 40)


def test_steps_may_take_their_batches_apart(marks):
    mark = marks()
    trainer = make_trainer(mark, max_epochs=1)
    trainer.fit(Taker(), named(train_set(400)), named(val_set()))
    assert trainer.callback_metrics["wm/ber"] >= 0
    assert trainer.test(Taker(), named(val_set()), verbose=False)[0]["wm/ber"] >= 0


class Packed(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["pair"], batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch["pair"], batch_idx)


def packed(data):
    return DataLoader(data, 40, collate_fn=lambda items: {"pair": torch.utils.data.default_collate(items)})


def test_strength_zero_trains_also_where_it_cannot_read():
    with pytest.warns(
        UserWarning, match="strength 0 and does not read this fit.*Override `GradSigns.images_and_labels`"
    ) as caught:
        make_trainer(make_mark(strength=0.0), max_epochs=2).fit(
            Packed(), packed(train_set(400)), packed(val_set())
        )
    assert sum("strength 0" in str(warning.message) for warning in caught) == 1


def test_batches_that_are_not_understood_are_an_error_when_signing():
    with pytest.raises(TypeError, match=r"Override `GradSigns.images_and_labels`"):
        make_trainer(make_mark()).fit(Packed(), packed(train_set(400)), packed(val_set()))


def test_batches_are_ignored_when_nothing_is_read():
    class Blind(type(make_mark())):
        def images_and_labels(self, batch):
            raise AssertionError("looked at a batch")

    mark = Blind(make_mark().key, strength=0.0, n_val_images=0)
    model = Packed()
    model.on_train_batch_start = lambda batch, batch_idx: vars(model).get("training_step") and 1 / 0
    make_trainer(mark, max_epochs=1).fit(model, packed(train_set(400)), packed(val_set()))
