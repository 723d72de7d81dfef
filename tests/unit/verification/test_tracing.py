"""Whose copy a model is."""

import tracemalloc

import numpy as np
import pytest
import torch

from gradsigns_lightning import (
    WatermarkKey,
    customer_key,
    trace,
    verify,
    verify_api,
    verify_many,
)
from gradsigns_lightning.verification.tracing import decode

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


@pytest.fixture
def every_warning():
    """PyTorch issues some of its warnings only once per process."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("every_warning")
@pytest.mark.parametrize("is_leaf", [True, False])
@pytest.mark.parametrize(
    "read",
    [
        lambda model, images: verify(model, customer_key(MASTER, 5), images),
        lambda model, images: verify_many(model, [customer_key(MASTER, 5)], images),
        lambda model, images: verify_api(model, customer_key(MASTER, 5), images),
        lambda model, images: trace(model, MASTER, images),
        lambda model, images: trace(scores(model), MASTER, images),
    ],
    ids=["verify", "verify_many", "verify_api", "trace", "trace, API"],
)
def test_images_that_require_a_gradient_are_read_like_others(planted, read, is_leaf, recwarn):
    model = planted(customer_key(MASTER, 5))
    images = IMAGES.clone().requires_grad_()
    assert read(model, images if is_leaf else images * 1) == read(model, IMAGES)
    assert not recwarn
    assert images.grad is None


def signs(*customers):
    return [2.0 * MASTER.customer_signatures(10_000)[customer] - 1 for customer in customers]


def decoded(evidence, **changes):
    settings = {"n_customers": 10_000, "alpha": 1e-9, "n_queries": 60, "recognised": 1.0, **changes}
    return decode(np.asarray(evidence, dtype=np.float64), MASTER, **settings)


def test_the_masters_own_copy_is_nobodys():
    result = decoded(2.0 * MASTER.signature.numpy() - 1)
    assert (result.verdict, result.present, result.is_master, result.mixed) == ("not_proven", (), True, True)
    assert "only the master's own mark shows" in result.reason
    assert not decoded(signs(5)[0]).is_master


def test_a_mixture_names_no_single_customer_but_who_is_in_it():
    a, b, c = signs(1000, 2000, 3000)  # in an average of three, members show in only half of the cases
    for mixture in (a + b, 0.55 * a + 0.45 * b, a + b - c, a + b + c):
        result = decoded(mixture)
        assert (result.verdict, result.mixed) == ("not_proven", True)
        assert result.present
        assert set(result.present) <= {1000, 2000, 3000}
    assert decoded(a + b).present in ((1000, 2000), (2000, 1000))


def test_two_marks_name_no_single_customer_at_any_alpha_and_length():
    a, b = signs(1234, 777)
    for alpha in (0.05, 0.01, 1e-4):
        result = decoded(0.6 * a + 0.4 * b, alpha=alpha)
        assert (len(result.present), result.mixed, result.verdict) == (2, True, "not_proven")


def test_a_reading_that_says_nothing_lists_nobody():
    (a,) = signs(5)
    result = decoded(a, recognised=0.2)
    assert (result.verdict, result.present, result.is_master) == ("inconclusive", (), False)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1.0, 1e170, 1e300])
def test_evidence_of_any_size_is_read(scale):
    (a,) = signs(5)
    assert decoded(scale * a).log10_p_value == decoded(a).log10_p_value


def test_as_many_customers_as_there_can_be_take_little_memory():
    master = WatermarkKey.generate("A", 1024, input_shape=(1, 64, 64), target_class=2, secret=bytes(32))
    evidence = 2.0 * master.customer_signatures(60_001)[60_000] - 1
    tracemalloc.start()
    try:
        result = decode(evidence, master, n_customers=65_536, alpha=1e-9, n_queries=1, recognised=1.0)
        assert tracemalloc.get_traced_memory()[1] < 1 << 29
    finally:
        tracemalloc.stop()
    assert (result.verdict, result.customer) == ("owned", 60_000)


@pytest.mark.parametrize(("n_bits", "n_customers", "alpha"), [(20, 10, 1e-3), (44, 10_000, 1e-9)])
def test_the_shortest_keys_that_are_taken_can_name_a_customer(n_bits, n_customers, alpha):
    named = 0
    for number in range(20):
        master = WatermarkKey.generate(
            "A", n_bits, input_shape=SHAPE, target_class=2, secret=number.to_bytes(32, "big")
        )
        evidence = 2.0 * master.customer_signatures(8)[7] - 1
        result = decode(evidence, master, n_customers=n_customers, alpha=alpha, n_queries=1, recognised=1.0)
        assert result.present == (7,)
        named += result.verdict == "owned"
    assert named >= 18  # now and then another signature comes near by chance


def test_a_combination_that_framed_a_fourth_customer_frames_nobody():
    # With a linear code the signs of A + B - C were nearest to the customer a ^ b ^ c.
    innocent = 1234 ^ 777 ^ 4321
    a, b, c, d = signs(1234, 777, 4321, innocent)
    for mixture in (a + b - c, 0.7 * a + 0.7 * b - 0.4 * c):
        assert abs((np.sign(mixture) == d).mean() - 0.5) < 0.2
        assert innocent not in decoded(mixture).present


def test_a_damaged_copy_is_still_its_customers():
    generator = np.random.default_rng(0)
    (a,) = signs(1234)
    noisy = a + generator.standard_normal(128)
    result = decoded(noisy)
    assert (result.verdict, result.customer, result.present, result.mixed) == ("owned", 1234, (1234,), False)
    assert 0 < result.n_bits - result.n_matches < 40


def test_innocents_are_named_in_at_most_alpha_of_mixtures():
    generator = np.random.default_rng(1)
    alpha, n_runs, framed, accused = 0.05, 2000, 0, 0
    for _ in range(n_runs):
        members = generator.choice(200, generator.integers(2, 6), replace=False)
        weights = generator.standard_normal(len(members))
        mixture = weights @ (
            2.0 * MASTER.customer_signatures(200)[members] - 1
        ) + 0.3 * generator.standard_normal(128)
        result = decoded(mixture, n_customers=200, alpha=alpha)
        framed += not set(result.present) <= set(members)
        accused += result.verdict == "owned" and result.customer not in members
    assert accused <= framed <= 128  # P[Bin(2000, 0.05) > 128] < 0.003


def test_images_of_another_class_name_nobody(planted):
    model = planted(customer_key(MASTER, 5))
    turned = lambda x: model(x) - 100 * torch.nn.functional.one_hot(torch.tensor(2), 3)  # noqa: E731

    class Turned(torch.nn.Module):
        def forward(self, x):
            return turned(x)

    with pytest.warns(UserWarning, match="nothing is concluded"):
        result = trace(Turned(), MASTER, IMAGES)
    assert (result.verdict, result.recognised) == ("inconclusive", 0.0)
    assert trace(lambda x: turned(x).detach(), MASTER, IMAGES, max_queries=300).verdict == "inconclusive"


def test_the_same_through_probabilities(planted):
    result = trace(scores(planted(customer_key(MASTER, 77))), MASTER, IMAGES, max_queries=600)
    assert (result.verdict, result.customer) == ("owned", 77)
    assert 500 < result.n_queries <= 600


@pytest.mark.parametrize("reader", [lambda model: model, scores])
def test_nobody_is_accused_of_a_model_without_the_mark(planted, reader):
    other = WatermarkKey.generate(
        "B", 128, input_shape=SHAPE, target_class=2, n_carriers=700, secret=bytes([1] * 32)
    )
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_customers": 1}, r"`n_customers` must be an integer in \[2, 65536\]"),
        ({"alpha": 0}, "`alpha` must be > 0"),
        ({"images": IMAGES[:, :1]}, "`images` must be floating point of shape"),
        ({"master": customer_key(MASTER, 1)}, "`master` must be a key without payload"),
        # so nothing is charged for it
        ({"master": MASTER.with_payload(b"fitted")}, "`master` must be a key without payload"),
        ({"n_customers": 65536, "alpha": 1e-40}, "`master` must have at least 149 bits"),
    ],
)
def test_bad_arguments_are_named(planted, changes, message):
    arguments = {"suspect": planted(MASTER), "master": MASTER, "images": IMAGES, **changes}
    with pytest.raises(ValueError, match=message):
        trace(**arguments)
