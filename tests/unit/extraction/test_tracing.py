"""Whose copy a model is, and what message it carries."""

import numpy as np
import pytest
import torch

from gradsigns_lightning import WatermarkKey, customer_key, message_key, read_message, trace

pytest.importorskip("galois")

SHAPE = (3, 16, 16)
MASTER = WatermarkKey.generate("A", 128, input_shape=SHAPE, target_class=2, n_carriers=700, secret=bytes(32))
IMAGES = 0.2 + 0.6 * torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(1))


def scores(model):
    return lambda x: model(x).softmax(1).detach()


@pytest.mark.parametrize("customer", [0, 4321, 9999])
def test_one_reading_finds_one_customer_of_10_000(planted, customer):
    model = planted(customer_key(MASTER, customer))
    result = trace(model, MASTER, IMAGES)
    assert (result.verdict, result.customer, result.n_customers) == ("owned", customer, 10_000)
    assert result.n_matches > 120
    assert result.n_matches - result.next_n_matches > 20
    assert result.commitment == customer_key(MASTER, customer).commitment
    assert result.p_value < 1e-20


def test_the_same_through_probabilities(planted):
    result = trace(scores(planted(customer_key(MASTER, 77))), MASTER, IMAGES, max_queries=600)
    assert (result.verdict, result.customer) == ("owned", 77)
    assert 500 < result.n_queries <= 600


@pytest.mark.parametrize("reader", [lambda model: model, scores])
def test_nobody_is_accused_of_a_model_without_the_mark(planted, reader):
    other = WatermarkKey.generate("B", 128, input_shape=SHAPE, target_class=2, n_carriers=700, secret=bytes([1] * 32))
    result = trace(reader(planted(other)), MASTER, IMAGES, max_queries=300)
    assert result.verdict == "not_proven"
    assert result.p_value > 1e-4


def test_the_p_value_pays_for_the_number_of_customers(planted):
    model = planted(customer_key(MASTER, 5))
    few, many = (trace(model, MASTER, IMAGES, n_customers=n) for n in (10, 1000))
    assert many.log10_p_value - few.log10_p_value == pytest.approx(2)


@pytest.mark.filterwarnings("ignore:The model takes")
def test_false_accusations_keep_alpha():
    # Random bits instead of a model: the share of traces with p <= 0.05 must not exceed 0.05.
    generator = np.random.default_rng(0)

    class Random(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.from_numpy(generator.standard_normal((768, 3))).float()

        def forward(self, x):
            return x.flatten(1) @ self.weights

    found = [trace(Random(), MASTER, IMAGES[:50], n_customers=200).p_value <= 0.05 for _ in range(100)]
    assert sum(found) <= 11  # P[Bin(100, 0.05) > 11] < 0.005


@pytest.mark.filterwarnings("ignore:The model takes")
def test_a_flat_model_is_inconclusive():
    class Flat(torch.nn.Module):
        def forward(self, x):
            return 0 * x.flatten(1)[:, :3]

    result = trace(Flat(), MASTER, IMAGES, n_customers=10)
    assert (result.verdict, result.n_erasures) == ("inconclusive", 128)
    assert result.to_dict()["p_value"] is None


def test_a_message_is_read_back_through_wrong_bits(planted):
    clean = read_message(planted(message_key(MASTER, "v2.1")), MASTER, IMAGES)
    assert (clean.text, clean.n_correctable) == ("v2.1", 15)
    noisy = read_message(planted(message_key(MASTER, "ok"), noise=2.5), MASTER, IMAGES)
    assert noisy.text == "ok"
    assert noisy.n_corrected > 0
    assert read_message(scores(planted(message_key(MASTER, "api"))), MASTER, IMAGES).text == "api"


def test_no_message_is_invented(planted):
    other = WatermarkKey.generate("B", 128, input_shape=SHAPE, target_class=2, n_carriers=700, secret=bytes([1] * 32))
    with pytest.raises(ValueError, match=r"no codeword within 15 errors|carries no message"):
        read_message(planted(other), MASTER, IMAGES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_customers": 1}, r"`n_customers` must be an integer in \[2, 65536\]"),
        ({"alpha": 0}, "`alpha` must be > 0"),
        ({"images": IMAGES[:, :1]}, "`images` must be floating point of shape"),
        ({"master": customer_key(MASTER, 1)}, "`master` must be a key without payload"),
    ],
)
def test_bad_arguments_are_named(planted, changes, message):
    arguments = {"suspect": planted(MASTER), "master": MASTER, "images": IMAGES, **changes}
    with pytest.raises(ValueError, match=message):
        trace(**arguments)
