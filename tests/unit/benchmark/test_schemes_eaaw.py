import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency
from sklearn.linear_model import Ridge
from torch import nn

from gradsigns_lightning.benchmark import Judge
from gradsigns_lightning.benchmark.schemes import Eaaw
from gradsigns_lightning.benchmark.schemes.eaaw import block_masks, independence_p_value, ridge_operator


@pytest.fixture(scope="module")
def marked(owner):
    return Eaaw(epochs=10, rate=3e-3).train(owner())


class Answers(nn.Module):
    """What an API makes of a network's logits."""

    def __init__(self, net, change):
        super().__init__()
        self.net, self.change = net, change

    def forward(self, x):
        return self.change(self.net(x))


def test_the_mark_is_proven_and_costs_no_accuracy(owner, marked, unmarked):
    judge = Judge(Eaaw().reader(owner()), owner().data.test_dataloader())
    with_mark, without = judge.point(marked, 0), judge.point(unmarked, 0)
    assert with_mark.reading.proven
    assert (with_mark.reading.n_matches, with_mark.reading.n_queries) == (64, 64)
    assert with_mark.reading.own_p_value < 1e-9
    assert not without.reading.proven
    assert without.reading.log10_p_value > -2
    assert without.reading.own_p_value > 0.01
    assert with_mark.accuracy > without.accuracy - 0.02
    assert without.accuracy > 0.95


def test_to_other_owners_a_network_tells_random_bits(owner, marked, unmarked):
    readers = [Eaaw().reader(owner(seed)) for seed in range(1, 21)]
    for net in (marked, unmarked):
        readings = [reader.read_weights(net) for reader in readers]
        n = sum(reading.n_bits for reading in readings)
        assert abs(sum(reading.n_matches for reading in readings) - n / 2) < 4 * math.sqrt(n) / 2
        assert not any(reading.proven for reading in readings)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits + 3 * logits[:, :1],
        lambda logits: logits.softmax(1),
        lambda logits: logits.log_softmax(1),
    ],
    ids=["logits", "probabilities", "log-probabilities"],
)
def test_all_scores_tell_the_same(owner, marked, change):
    reader = Eaaw().reader(owner())
    expected, found = reader.read_weights(marked), reader.read_responses(Answers(marked, change))
    assert (found.n_matches, found.verdict) == (expected.n_matches, "owned")
    assert found.w == pytest.approx(expected.w, rel=1e-3)


def test_labels_alone_prove_nothing_and_no_number_tells_nothing(owner, marked):
    reader = Eaaw().reader(owner())
    labels = reader.read_responses(Answers(marked, lambda logits: logits.argmax(1)))
    assert labels.verdict != "owned"
    broken = reader.read_responses(Answers(marked, lambda logits: logits * math.nan))
    assert (broken.verdict, broken.n_erasures) == ("inconclusive", 64)
    assert math.isnan(broken.own_p_value)


def test_what_is_embedded_is_what_is_read(owner, unmarked):
    secret = Eaaw(n_triggers=3, n_bits=16).reader(owner()).secret
    assert secret.labels.tolist() == [0, 1, 2]
    torch.testing.assert_close(
        secret.attribution(unmarked).detach().double(), secret.told(unmarked), rtol=1e-3, atol=1e-4
    )
    assert Eaaw(n_triggers=3, n_bits=16).reader(owner()).read_weights(unmarked).n_queries == 48


def test_the_same_seed_gives_the_same_network(owner):
    first, second = (Eaaw(epochs=1).train(owner(epochs=1)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_norms_keep_their_statistics_while_the_bits_are_embedded(owner):
    network = {"_target_": "gradsigns_lightning.models.SmallResNet", "in_channels": 1, "n_classes": 10}
    few = owner(epochs=1, network={**network, "width": 4})
    with_mark, without = (
        dict(Eaaw(epochs=1, rate=rate, n_bits=4).train(few).named_buffers()) for rate in (1e-3, 0)
    )
    assert any(name.endswith("running_mean") for name in with_mark)
    assert all(torch.equal(with_mark[name], without[name]) for name in with_mark)


@pytest.mark.parametrize(("n_blocks", "size"), [(64, (8, 8)), (256, (28, 28)), (16, (9, 30))])
def test_each_pixel_lies_in_one_block(n_blocks, size):
    masks = block_masks(n_blocks, size)
    assert masks.shape == (n_blocks, *size)
    assert torch.equal((1 - masks).sum(0), torch.ones(size))
    assert (1 - masks).sum((1, 2)).min() >= 1


def test_the_regression_is_ridge():
    metric = np.random.default_rng(0).normal(size=25)
    fitted = Ridge(alpha=1e-3, fit_intercept=False, solver="cholesky").fit(1 - np.eye(25), metric)
    np.testing.assert_allclose(ridge_operator(25, 1e-3).numpy() @ metric, fitted.coef_, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_papers_own_test_is_the_chi_square_of_a_table(share):
    draw = np.random.default_rng(1)
    bits, read = draw.random(64) < 0.4, draw.random(64) < 0.5
    read = np.where(draw.random(64) < share, bits, read)
    table = [[np.sum((read == i) & (bits == j)) for j in (1, 0)] for i in (1, 0)]
    found = independence_p_value(torch.from_numpy(read), torch.from_numpy(bits))
    assert found == pytest.approx(chi2_contingency(table).pvalue, rel=1e-9)


def test_there_is_no_table_where_all_bits_are_equal():
    bits = torch.arange(8) % 2 == 0
    assert math.isnan(independence_p_value(torch.ones(8, dtype=torch.bool), bits))
    assert math.isnan(independence_p_value(bits, torch.zeros(8, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"n_bits": 60}, ValueError, "`n_bits` must be a square number, got 60"),
        ({"n_bits": 1}, ValueError, "`n_bits` must be an integer >= 4"),
        ({"n_triggers": 0}, ValueError, "`n_triggers` must be an integer >= 1"),
        ({"rate": -1.0}, ValueError, "`rate` must be a finite number >= 0"),
        ({"margin": "wide"}, TypeError, "`margin` must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        Eaaw(**settings)


def test_more_blocks_than_pixels_are_refused(owner):
    with pytest.raises(ValueError, match="`n_bits` must be at most 64 for these images, got 81"):
        Eaaw(n_bits=81).reader(owner())
