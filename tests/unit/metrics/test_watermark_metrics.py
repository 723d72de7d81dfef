"""Metric classes and functions against independent references."""

import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryHammingDistance
from torchmetrics.regression import MeanAbsoluteError

from gradsigns_lightning.core.torch_state import precision
from gradsigns_lightning.metrics import BitErrorRate, MeanInputGradient, OwnershipPValue, SmallestMargin
from gradsigns_lightning.metrics import functional as M
from gradsigns_lightning.metrics.functional.watermark import count_matches

SHAPE = (2, 3, 4)


def bit_batches(n_updates=4, shape=(5, 16), flips=0.2):
    generator = np.random.default_rng(0)
    signatures = [generator.integers(0, 2, shape) for _ in range(n_updates)]
    return [(np.where(generator.random(shape) < flips, 1 - s, s), s) for s in signatures]


def margin_batches(n_updates=4, shape=(5, 16)):
    generator = np.random.default_rng(0)
    return [
        (generator.standard_normal(shape).astype(np.float32), generator.integers(0, 2, shape))
        for _ in range(n_updates)
    ]


def all_of(batches):
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def reference_ber(bits, signature):
    return float(np.mean(bits != signature))


def reference_p_value(bits, signature):
    return binom.sf((bits == signature).sum() - 1, bits.size, 0.5)


def reference_margin(projections, signature):
    return float(np.where(signature == 1, projections, -projections).min())


CASES = {
    "ber": (BitErrorRate, M.bit_error_rate, reference_ber, bit_batches),
    "p_value": (OwnershipPValue, M.ownership_p_value, reference_p_value, bit_batches),
    "margin": (SmallestMargin, M.smallest_margin, reference_margin, margin_batches),
}
cases = pytest.mark.parametrize(
    ("metric_class", "function", "reference", "batches"), CASES.values(), ids=CASES
)


def tensors(batch):
    return tuple(torch.from_numpy(part) for part in batch)


@cases
def test_function_against_reference(metric_class, function, reference, batches):
    for batch in batches():
        assert function(*tensors(batch)).item() == pytest.approx(reference(*batch), rel=1e-6)


@cases
def test_class_against_reference(metric_class, function, reference, batches):
    metric = metric_class()
    for batch in batches():
        # forward gives the batch's value
        assert metric(*tensors(batch)).item() == pytest.approx(reference(*batch), rel=1e-6)
    assert metric.compute().item() == pytest.approx(reference(*all_of(batches())), rel=1e-6)
    metric.reset()
    metric.update(*tensors(batches()[1]))
    assert metric.compute().item() == pytest.approx(reference(*batches()[1]), rel=1e-6)


@cases
def test_merged_and_cloned_and_pickled(metric_class, function, reference, batches):
    first, second, *_ = batches()
    one, two = metric_class(), metric_class()
    one.update(*tensors(first))
    for copy in (one.clone(), pickle.loads(pickle.dumps(one))):
        copy.update(*tensors(second))
        assert copy.compute().item() == pytest.approx(reference(*all_of([first, second])), rel=1e-6)
    assert one.compute().item() == pytest.approx(reference(*first), rel=1e-6)
    two.update(*tensors(second))
    two.merge_state(one)
    assert two.compute().item() == pytest.approx(reference(*all_of([first, second])), rel=1e-6)


@pytest.mark.parametrize(
    "metric",
    [BitErrorRate(), OwnershipPValue(), SmallestMargin(), MeanInputGradient(SHAPE)],
    ids=lambda m: type(m).__name__,
)
def test_checkpoints_stay_empty_and_calls_before_updates_warn(metric):
    assert metric.state_dict() == {}
    with pytest.warns(UserWarning, match="was called before the ``update``"):
        metric.compute()


@cases
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_any_number_of_dimensions(metric_class, function, reference, batches, shape):
    batch = batches(1, shape)[0]
    assert function(*tensors(batch)).item() == pytest.approx(reference(*batch), rel=1e-6)
    assert metric_class()(*tensors(batch)).item() == pytest.approx(reference(*batch), rel=1e-6)


@cases
def test_other_shapes_are_refused(metric_class, function, reference, batches):
    left, right = tensors(batches(1, (4, 8))[0])
    for update in (function, metric_class().update):
        with pytest.raises((ValueError, RuntimeError), match="shape"):
            update(left, right[:, :7])


@pytest.mark.parametrize("function", [M.bit_error_rate, M.ownership_p_value, M.smallest_margin])
def test_the_refusal_names_the_argument_and_both_shapes(function):
    with pytest.raises(ValueError, match=r"`preds` must have the shape of `target`, \(8,\), got \(1,\)"):
        function(torch.ones(1), torch.ones(8))


@cases
def test_arguments_are_named_as_torchmetrics_names_them(metric_class, function, reference, batches):
    batch = batches()[0]
    preds, target = tensors(batch)
    expected = pytest.approx(reference(*batch), rel=1e-6)
    updated = metric_class()
    updated.update(preds=preds, target=target)
    by_name = (
        function(preds=preds, target=target),
        updated.compute(),
        metric_class()(preds=preds, target=target),
    )
    assert [value.item() for value in by_name] == [expected] * 3


@pytest.mark.parametrize("by_keyword", [False, True])
def test_bits_go_through_a_collection_with_other_metrics(by_keyword):
    ours = {"ber": BitErrorRate(), "p": OwnershipPValue(), "log10": OwnershipPValue(log10=True)}
    metrics = MetricCollection({"accuracy": BinaryAccuracy(), "hamming": BinaryHammingDistance(), **ours})
    for preds, target in map(tensors, bit_batches()):
        metrics.update(**{"preds": preds, "target": target}) if by_keyword else metrics.update(preds, target)
    values, (bits, signature) = metrics.compute(), all_of(bit_batches())
    ber, p_value = reference_ber(bits, signature), reference_p_value(bits, signature)
    expected = {"accuracy": 1 - ber, "hamming": ber, "ber": ber, "p": p_value, "log10": math.log10(p_value)}
    assert {name: value.item() for name, value in values.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_projections_go_through_a_collection_with_other_metrics(by_keyword):
    metrics = MetricCollection([SmallestMargin(), MeanAbsoluteError()])
    for preds, target in map(tensors, margin_batches()):
        metrics.update(**{"preds": preds, "target": target}) if by_keyword else metrics.update(preds, target)
    assert metrics.compute()["SmallestMargin"].item() == pytest.approx(
        reference_margin(*all_of(margin_batches()))
    )


def test_gradients_go_through_a_collection_by_keyword():
    metrics = MetricCollection([BitErrorRate(), MeanInputGradient(SHAPE)])
    metrics.update(preds=torch.tensor([1, 0]), target=torch.tensor([1, 1]), gradients=torch.ones(3, *SHAPE))
    assert torch.equal(metrics.compute()["MeanInputGradient"], torch.ones(SHAPE))
    assert metrics.compute()["BitErrorRate"] == 0.5


@pytest.mark.parametrize("update", [M.ownership_p_value, OwnershipPValue().update])
@pytest.mark.parametrize(
    ("preds", "target", "found"),
    [
        ([0.3, 1.0], [0, 1], "`preds` .*, got 0.3"),
        ([1, 2], [0, 1], "`preds` .*, got 2"),
        ([1, -1], [1, -1], "`target` .*, got -1"),
    ],
)
def test_what_is_not_a_bit_is_not_counted(update, preds, target, found):
    with pytest.raises(ValueError, match=found):
        update(torch.tensor(preds), torch.tensor(target))


def test_a_margin_is_of_projections_and_bits():
    with pytest.raises(
        TypeError,
        match=r"`preds` must be floating-point projections z, not bits, got "
        r"torch.int64",
    ):
        M.smallest_margin(torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="`target` must hold bits, 0 or 1, got -1"):
        M.smallest_margin(torch.tensor([0.5, 1.0]), torch.tensor([-1, 1]))


def test_a_device_without_float64_gets_float32(monkeypatch):
    bits = torch.ones(1000, dtype=torch.int)
    monkeypatch.setattr(precision, "_WITHOUT_FLOAT64", ("cpu",))
    for log10, expected in ((False, 0.0), (True, -1000 * math.log10(2))):
        for value in (M.ownership_p_value(bits, bits, log10=log10), OwnershipPValue(log10=log10)(bits, bits)):
            assert value.dtype == torch.float32
            assert value.item() == pytest.approx(expected)


def test_the_logarithm_without_bits_and_of_erasures_alone():
    nothing, erased = torch.zeros(0), torch.full((4,), -1)
    assert M.ownership_p_value(nothing, nothing, log10=True) == 0
    assert math.isnan(M.ownership_p_value(erased, torch.ones(4), log10=True))


def test_p_value_is_exact_where_float32_underflows():
    bits = torch.ones(1000, dtype=torch.int)
    assert M.ownership_p_value(bits, bits).item() == 2.0**-1000
    metric = OwnershipPValue()
    for _ in range(10):
        metric.update(bits[:100], bits[:100])
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == 2.0**-1000


def test_p_value_of_no_match_and_of_no_bits():
    assert M.ownership_p_value(torch.zeros(64), torch.ones(64)).item() == 1.0
    assert M.ownership_p_value(torch.zeros(0), torch.zeros(0)).item() == 1.0


def test_many_pooled_bits_are_counted_in_little_memory():
    bits = torch.ones(30_000, dtype=torch.int)
    guess = bits.clone()
    guess[:14_700] = 0
    assert M.ownership_p_value(guess, bits).item() == pytest.approx(binom.sf(15_299, 30_000, 0.5), rel=1e-8)


def test_counts():
    assert [int(v) for v in count_matches(torch.tensor([1, 0, 1]), torch.tensor([1, 1, 1]))] == [2, 3]
    assert [int(v) for v in count_matches(torch.tensor([1, 0, -1]), torch.tensor([1, 1, 1]))] == [1, 2]


def test_bits_of_projections():
    assert M.bits_of(torch.tensor([[-0.5, 1.5], [0.0, -0.0]])).tolist() == [[0, 1], [-1, -1]]
    assert M.bits_of(torch.tensor([-0.5, 1.5, math.inf])).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("metric_class", "function", "reference", "batches"), list(CASES.values())[:2], ids=["ber", "p_value"]
)
def test_erasures_count_neither_for_nor_against(metric_class, function, reference, batches):
    metric, seen = metric_class(), []
    for number, (bits, signature) in enumerate(batches()):
        erased = np.random.default_rng(number).random(bits.shape) < 0.3
        seen.append((bits[~erased], signature[~erased]))
        read = tensors((np.where(erased, -1, bits), signature))
        assert function(*read).item() == pytest.approx(reference(*seen[-1]), rel=1e-6)
        assert metric(*read).item() == pytest.approx(reference(*seen[-1]), rel=1e-6)
    assert metric.compute().item() == pytest.approx(reference(*all_of(seen)), rel=1e-6)
    nothing = torch.full((4,), -1), torch.ones(4, dtype=torch.int)
    assert math.isnan(function(*nothing))
    assert math.isnan(metric_class()(*nothing))


@pytest.mark.parametrize("undecided", [[0.0, 0.0], [math.inf, 1.0], [math.nan, 1.0]])
def test_there_is_no_margin_where_no_bit_is_decided(undecided):
    assert math.isnan(M.smallest_margin(torch.tensor(undecided), torch.tensor([1, 1])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_margin_in_other_precisions(dtype):
    projections, signature = tensors(margin_batches(1)[0])
    expected = reference_margin(projections.to(dtype).double().numpy(), signature.numpy())
    assert M.smallest_margin(projections.to(dtype), signature).dtype == dtype
    assert M.smallest_margin(projections.to(dtype), signature).item() == pytest.approx(expected)
    assert SmallestMargin()(projections.to(dtype), signature).item() == pytest.approx(expected)
    assert SmallestMargin().set_dtype(dtype)(projections.to(dtype), signature).item() == pytest.approx(
        expected
    )


def test_margin_is_differentiable():
    projections = torch.tensor([-0.5, 1.5, 0.2], requires_grad=True)
    M.smallest_margin(projections, torch.tensor([0, 1, 1])).backward()
    assert projections.grad.tolist() == [0, 0, 1]


def test_margin_of_a_nan_is_nan():
    metric = SmallestMargin()
    metric.update(torch.tensor([math.nan, 1.0]), torch.tensor([1, 1]))
    assert math.isnan(metric.compute())


def gradient_batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, *SHAPE, generator=generator) for n in (3, 0, 1, 5)]


def test_mean_gradient_is_the_mean_over_images_not_over_batches():
    metric = MeanInputGradient(SHAPE)
    for batch in gradient_batches():
        metric.update(batch)
    torch.testing.assert_close(metric.compute(), torch.cat(gradient_batches()).mean(0))
    twin = pickle.loads(pickle.dumps(metric.clone()))
    assert torch.equal(twin.compute(), metric.compute())
    metric.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not metric.compute().any()


def test_mean_gradient_forward_gives_the_batch():
    metric = MeanInputGradient(SHAPE)
    for batch in gradient_batches()[2:]:
        torch.testing.assert_close(metric(batch), batch.mean(0))
    torch.testing.assert_close(metric.compute(), torch.cat(gradient_batches()[2:]).mean(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_mean_gradient_adds_up_in_float32(dtype):
    metric, tiny = MeanInputGradient(SHAPE), torch.full((5000, *SHAPE), 0.1, dtype=dtype)
    metric.update(tiny)
    assert metric.compute().dtype == torch.float32
    torch.testing.assert_close(metric.compute(), tiny[0].float())


def test_mean_gradient_adds_up_in_float32_whatever_the_default_is():
    with precision.default_dtype(torch.bfloat16):
        metric = MeanInputGradient(SHAPE)
    assert metric.total.dtype == torch.float32


def test_mean_gradient_holds_no_graph():
    metric = MeanInputGradient(SHAPE)
    metric.update(torch.randn(2, *SHAPE, requires_grad=True))
    assert not metric.total.requires_grad


@pytest.mark.parametrize("shape", [(3, 1, 3, 4), (3, 3, 4), (2, 3, 4), (1, 1, 2, 3, 4), (3, 2, 3, 5)])
def test_mean_gradient_refuses_shapes_that_would_broadcast(shape):
    metric = MeanInputGradient(SHAPE)
    with pytest.raises(ValueError, match=r"`gradients` must have shape \(n, 2, 3, 4\), got"):
        metric.update(torch.zeros(shape))
    assert metric.n_images == 0
