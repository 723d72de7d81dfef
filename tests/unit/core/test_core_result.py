"""Results in words."""

import math
from dataclasses import replace

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from gradsigns_lightning import WatermarkKey, customer_key, trace, verify, verify_api
from gradsigns_lightning.evidence import Bundle, judge, make_statement

SHAPE, T = (3, 16, 16), 2
pytestmark = pytest.mark.filterwarnings("ignore:Only", "ignore:The model classifies only", "ignore:A key of")
IMAGES = 0.2 + 0.6 * torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(1))


def key_number(i, n_bits=64):
    return WatermarkKey.generate(
        "A", n_bits, input_shape=SHAPE, target_class=T, n_carriers=384, secret=i.to_bytes(32, "big")
    )


KEY = key_number(7)


@pytest.fixture(scope="module")
def model(planted):
    return planted(KEY)


class Turned(nn.Module):
    """A model that classifies the target class's images as another class."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).roll(1, 1)


def lines(result, n=3):
    found = str(result).split("\n")
    assert len(found) == n
    assert repr(result).startswith(f"{type(result).__name__}(")
    assert found[0].endswith(f": {result.reason}")
    return found


def test_a_reading_of_the_weights(model):
    verdict, bits, read = lines(verify(model, KEY, IMAGES))
    assert verdict == "owned: p <= alpha = 1e-09"
    assert bits == "63 of 64 bits match, p = 3.5e-18"
    assert read.startswith("60 images read, ")


@pytest.mark.parametrize(
    ("free_bits", "reported"), [(0.0, False), (30.0, False), (60.0, True), (math.nan, False)]
)
def test_bits_that_could_be_fitted_are_reported_where_they_decide(model, free_bits, reported):
    result = replace(verify(model, KEY, IMAGES), free_bits=free_bits)
    assert result.verdict == "owned"
    assert (
        ", for the key's maker alone: 60 bits of it could be fitted to this model" in result.reason
    ) == reported


def test_a_reading_of_an_unmarked_models_weights(model):
    verdict, _, _ = lines(verify(model, key_number(8), IMAGES))
    assert verdict == "not proven: p > alpha = 1e-09, which takes 56 of 64 bits"


def test_the_number_of_bits_that_it_takes_is_the_least_that_suffices(model):
    result = verify(model, key_number(8), IMAGES, alpha=0.03)
    assert result.reason == "p > alpha = 0.03, which takes 40 of 64 bits"


@pytest.mark.parametrize(
    "reader", [verify, lambda model, key, images: verify_api(lambda x: model(x).detach(), key, images)]
)
def test_a_key_that_can_never_be_owned(planted, reader):
    key = key_number(9, 24)
    verdict, _, _ = lines(reader(planted(key), key, IMAGES))
    assert verdict == "not proven: p > alpha = 1e-09, which 24 bits can never reach: 30 would do"


@pytest.mark.parametrize("reader", [verify, verify_api, lambda model, key, images: trace(model, key, images)])
def test_images_of_another_class(model, reader):
    verdict, _, _ = lines(reader(Turned(model), KEY, IMAGES))
    assert verdict.startswith("inconclusive: the model classifies only ")
    assert "input_mean" in verdict


def test_no_bit_decided(model):
    constant = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    nn.init.zeros_(constant[1].weight)
    constant[1].bias.data = torch.tensor([0.0, 0.0, 9.0])
    verdict, bits, _ = lines(verify(constant, KEY, IMAGES))
    assert verdict == "inconclusive: no bit could be decided, because the gradient is all zero or not finite"
    assert bits == "none of 64 bits decided"
    verdict, bits, _ = lines(verify_api(constant, KEY, IMAGES, max_queries=300))
    assert verdict.startswith(
        "inconclusive: no bit could be decided, because the answers to the probes are all alike"
    )
    assert bits == "none of 63 bits decided" or bits == "none of 64 bits decided"


def test_a_p_value_below_what_a_double_holds(model):
    result = replace(
        verify(model, KEY, IMAGES),
        n_bits=2048,
        n_matches=2048,
        p_value=0.0,
        log10_p_value=-2048 * math.log10(2),
    )
    assert lines(result)[1] == "2048 of 2048 bits match, p = 10^-616.5"


def test_a_trace(planted, model):
    copy = planted(customer_key(KEY, 3))
    verdict, bits, _ = lines(trace(copy, KEY, IMAGES, n_customers=10))
    assert verdict == "owned: the copy of customer 3, p <= alpha = 1e-09"
    assert bits.startswith("customer 3, the nearest of 10: 64 of 64 bits match, p = ")
    verdict, _, _ = lines(trace(planted(key_number(300)), KEY, IMAGES, n_customers=10))
    assert verdict == "not proven: p > alpha = 1e-09 for every customer"


def test_a_judgement(model):
    signer = Ed25519PrivateKey.generate()
    bundle = Bundle(key=KEY, statement=make_statement([KEY], signer))
    verdict, bits, read = lines(judge(bundle, suspect=model, images=IMAGES))
    assert verdict.startswith("not proven: adjusted p > alpha = 1e-09; no trusted time-stamp")
    assert bits == "63 of 64 bits match, p = 3.5e-18, adjusted 10^0.0 for 2^64 tries"
    assert read.startswith("the judge's own reading: 60 images queried")
