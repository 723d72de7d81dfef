"""What the callback must not change: the task's numbers at strength 0, its random stream always, the meaning of a step."""

import random

import numpy as np
import pytest
import torch
from signed_digits import TARGET, Net, conv_net, make_mark, make_trainer, mlp, train_loader, train_set, val_loader
from torch.utils.data import DataLoader, TensorDataset


class Keeper(Net):
    """Keeps what the task's random stream and optimizer gave."""

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
    (plain, plain_rng), (signed, signed_rng) = fit(net=net, **settings), fit(make_mark(strength=0.0), net=net, **settings)
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
    """Data whose target images all lie in the first quarter of each block, so that both runs have seen them when they embed."""
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
    """Measured directly: one optimizer step of SGD at lr 0.1 moves by task gradient plus the embedding gradient."""
    moves = []
    for factor, mark in ((1, True), (1, False), (4, True), (4, False)):
        torch.manual_seed(0)
        model = Net(optimizer="sgd")
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        trainer = make_trainer(*([make_mark()] if mark else []), accumulate_grad_batches=factor, max_steps=1)
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
    assert steps == [0, 2, 4, 6]
