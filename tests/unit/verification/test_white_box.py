"""Reading the signature from the weights."""

import copy
import json
import math
import time
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from gradsigns_lightning import VerificationResult, WatermarkKey, verify, verify_many
from gradsigns_lightning.core import signature
from gradsigns_lightning.core.result import decide
from gradsigns_lightning.core.statistics import log10_ownership_p_value, ownership_p_value
from gradsigns_lightning.models import SmallResNet
from gradsigns_lightning.verification.images import RawInputs

SHAPE = (1, 6, 6)
T = 1
pytestmark = pytest.mark.filterwarnings("ignore:Only", "ignore:The model classifies only")


def numbered(i: int, n_bits=16, **changes) -> WatermarkKey:
    arguments = {"input_shape": SHAPE, "target_class": T, "n_carriers": 30, "secret": i.to_bytes(32, "big")}
    return WatermarkKey.generate("A", n_bits, **{**arguments, **changes})


KEY = numbered(7, input_mean=0.3, input_std=0.4)


def network(channels=1, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(channels, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    model[1].running_mean.uniform_(-0.2, 0.2)
    return model


def raw_images(n=60, channels=1):
    return torch.rand(n, channels, 6, 6, generator=torch.Generator().manual_seed(2))


class Scripted(nn.Module):
    """Two logits, linear in the input, so that the input gradient points along ``direction``."""

    def __init__(self, direction):
        super().__init__()
        self.direction = nn.Parameter(direction.flatten().float())

    def forward(self, x):
        score = x.flatten(1) @ self.direction
        score = score - score.detach() - 1  # every image is of class 1
        # J = -log p_1 = softplus(score), dJ/dx along direction
        return torch.stack([score, torch.zeros_like(score)], 1)


def marked(key: WatermarkKey, wrong=0) -> Scripted:
    """A model whose gradient shows the key's signature, except in the first ``wrong`` bits."""
    signs = key.signature.double() * 2 - 1
    signs[:wrong] *= -1
    direction = torch.zeros(math.prod(key.input_shape), dtype=torch.float64)
    direction[key.carriers] = torch.linalg.pinv(key.projection.double()) @ signs
    return Scripted(direction)


# --- the bits


def test_bits_by_hand():
    model, images = network().eval(), raw_images()
    x = ((images - 0.3) / 0.4).requires_grad_()
    (-F.log_softmax(model(x), 1)[:, T]).mean().backward()
    rows = (x.grad / 0.4).flatten(1).double()
    g = (rows / rows.norm(dim=1, keepdim=True)).sum(0)[KEY.carriers]  # every image's gradient counts alike
    z = KEY.projection.double() @ (g / g.norm())
    matches = int(((z > 0).to(torch.uint8) == KEY.signature).sum())
    result = verify(network(), KEY, images)
    assert result.n_matches == matches
    assert result.margin == pytest.approx(float(((KEY.signature.double() * 2 - 1) * z).min()), rel=1e-4)
    assert result.bit_error_rate == (16 - matches) / 16
    assert result.p_value == ownership_p_value(matches, 16)
    assert result.log10_p_value == log10_ownership_p_value(matches, 16)
    assert (result.n_bits, result.n_erasures, result.n_queries, result.alpha) == (16, 0, 60, 1e-9)
    assert result.commitment == KEY.commitment


@pytest.mark.parametrize("wrong", [0, 1, 5, 16])
def test_a_scripted_model_shows_the_scripted_bits(wrong):
    key = numbered(3)
    result = verify(marked(key, wrong), key, raw_images())
    assert (result.n_matches, result.bit_error_rate) == (16 - wrong, wrong / 16)
    assert result.p_value == ownership_p_value(16 - wrong, 16)


def test_verdicts():
    key = numbered(3, 32, n_carriers=36)
    assert verify(marked(key), key, raw_images()).verdict == "owned"
    assert verify(marked(key, 1), key, raw_images()).verdict == "not_proven"
    assert verify(marked(key, 1), key, raw_images(), alpha=1e-7).verdict == "owned"
    assert verify(marked(key), key, raw_images(), alpha=2.0**-32).verdict == "owned"  # p <= alpha, not <
    assert verify(marked(key), key, raw_images(), alpha=2.0**-32 * 0.999).verdict == "not_proven"


def test_the_scale_of_the_gradient_changes_nothing():
    key = numbered(3)
    for scale in (1e-12, 1e12):
        model = marked(key)
        model.direction.data *= scale
        assert verify(model, key, raw_images() * 1e-13).n_matches == 16


def test_batch_size_and_order_change_nothing():
    model, images = network(), raw_images()
    results = [verify(model, KEY, images, batch_size=b) for b in (1, 7, 60, 1000)]
    results.append(verify(model, KEY, images.flip(0)))
    assert len({r.n_matches for r in results}) == 1
    assert [r.margin for r in results] == pytest.approx([results[0].margin] * 5, rel=1e-4)


def test_normalisation_in_the_key_equals_normalization_in_the_model():
    mean, std = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1), torch.tensor([0.2, 1.0, 3.0]).view(3, 1, 1)

    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network(3)

        def forward(self, x):
            return self.inner((x - mean) / std)

    normalized = {"input_mean": [0.1, 0.5, 0.9], "input_std": [0.2, 1.0, 3.0]}
    key = numbered(5, 100, input_shape=(3, 6, 6), n_carriers=108, **normalized)
    by_key = verify(network(3), key, raw_images(channels=3))
    raw = verify(Normalized(), key, raw_images(channels=3), input_mean=0.0, input_std=1.0)
    wrapped = verify(
        RawInputs(network(3), **normalized), key, raw_images(channels=3), input_mean=0.0, input_std=1.0
    )
    other_key = numbered(5, 100, input_shape=(3, 6, 6), n_carriers=108)
    stated = verify(network(3), other_key, raw_images(channels=3), **normalized)
    by_default = verify(Normalized(), other_key, raw_images(channels=3))
    assert by_key.n_matches == raw.n_matches == wrapped.n_matches
    assert by_key.margin == pytest.approx(raw.margin, rel=1e-3)
    assert wrapped.margin == pytest.approx(raw.margin, rel=1e-6)
    assert stated.n_matches == by_default.n_matches
    assert stated.margin == pytest.approx(by_default.margin, rel=1e-3)
    assert stated.commitment == other_key.commitment
    unlike = verify(network(3), other_key, raw_images(channels=3))
    assert unlike.margin != pytest.approx(stated.margin, rel=1e-3)


@pytest.mark.parametrize(
    ("stated", "error", "message"),
    [
        ({"input_std": 0.0}, ValueError, "`input_std` must be positive"),
        ({"input_mean": [0.1, 0.2]}, ValueError, "`input_mean` must be one value or one per channel"),
        ({"input_mean": "no"}, TypeError, "`input_mean` must be a number"),
        ({"input_std": float("inf")}, ValueError, "`input_std` must be a finite number"),
    ],
)
def test_a_stated_normalization_is_checked(stated, error, message):
    with pytest.raises(error, match=message):
        verify(network(), KEY, raw_images(), **stated)


def test_images_that_the_model_does_not_take_for_the_class_prove_nothing():
    key = numbered(3, 32, n_carriers=36)

    class Turned(Scripted):
        def forward(self, x):
            return super().forward(x) + torch.tensor([2.0, 0.0])  # every image is of class 0

    model = Turned(marked(key).direction.detach())
    result = verify(model, key, raw_images())
    assert (result.n_matches, result.recognised, result.verdict) == (32, 0.0, "inconclusive")
    assert verify(marked(key), key, raw_images()).recognised == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes(dtype):
    key = numbered(3)
    result = verify(marked(key).to(dtype), key, raw_images())
    assert result.n_matches >= 14
    assert result.n_erasures == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_images_of_other_dtypes(dtype):
    key = numbered(3)
    assert verify(marked(key), key, raw_images().to(dtype)).n_matches == 16


def test_a_model_without_parameters_is_read():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3]

    assert verify(Fixed(), KEY, raw_images()).n_queries == 60


def test_own_logits_function():
    key = numbered(3)
    model = nn.ModuleDict({"inner": marked(key)})
    result = verify(model, key, raw_images(), logits=lambda x: model["inner"](x))
    assert result.n_matches == 16


def test_a_falsy_logits_module_is_still_used():
    class Empty(nn.Module):
        def __len__(self):
            return 0

        def forward(self, x):
            return marked(key)(x)

    key = numbered(3)
    assert verify(network(), key, raw_images(), logits=Empty()).n_matches == 16


# --- what it leaves alone


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_everything_is_as_before(outer, training):
    model = network().train(training)
    model[1].training = not training
    model[5].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    expected = verify(network(), KEY, raw_images())
    with outer():
        images = raw_images()
        before = (
            copy.deepcopy(model.state_dict()),
            [m.training for m in model.modules()],
            torch.get_rng_state(),
            images.clone(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
        result = verify(model, KEY, images)
        after = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert result == expected
    assert after == before[4:]
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(images, before[3])
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False, True]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "0.weight")


def test_everything_is_as_before_a_model_that_fails():
    model = network()
    model[5] = nn.Identity()  # 64 features are taken for logits; the last module then raises
    model.append(nn.Linear(3, 3))
    rng = torch.get_rng_state()
    with pytest.raises(ValueError, match="`model` \\(Sequential\\) must take images"), torch.no_grad():
        verify(model, KEY, raw_images())
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()


def test_a_key_first_used_in_inference_mode_can_be_trained_with():
    key, model = numbered(11), network()
    with torch.inference_mode():
        verify(model, key, raw_images())
    x = torch.rand(36, requires_grad=True)
    x[key.carriers].sum().backward()
    assert x.grad.sum() == 30


# --- what cannot be decided


class Broken(nn.Module):
    """Answers with logits times ``factor``, plus a constant."""

    def __init__(self, factor):
        super().__init__()
        self.inner, self.factor = network(), factor

    def forward(self, x):
        return self.inner(x) * self.factor


@pytest.mark.parametrize("factor", [0.0, math.nan, math.inf])
def test_constant_and_nan_models_are_inconclusive(factor):
    result = verify(Broken(factor), KEY, raw_images())
    assert (result.verdict, result.n_matches, result.n_erasures) == ("inconclusive", 0, 16)
    assert all(
        math.isnan(v) for v in (result.bit_error_rate, result.p_value, result.log10_p_value, result.margin)
    )
    text = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert [text[k] for k in ("bit_error_rate", "p_value", "log10_p_value", "margin")] == [None] * 4
    assert text["verdict"] == "inconclusive"


def test_one_nan_pixel_gradient_erases_all_bits():
    z = torch.ones(16)
    z[3] = math.nan
    assert decide(z, KEY, n_queries=1, alpha=0.5).n_erasures == 16


def test_ties_are_erasures_not_ones():
    z = (KEY.signature.double() * 2 - 1) * 0.25
    z[[2, 5, 9]] = torch.tensor([0.0, -0.0, 0.0], dtype=torch.float64)
    z[0] *= -1
    result = decide(z, KEY, n_queries=10, alpha=1e-9)
    assert (result.n_bits, result.n_erasures, result.n_matches) == (16, 3, 12)
    assert result.bit_error_rate == 1 / 13
    assert result.p_value == ownership_p_value(12, 13)
    assert result.margin == -0.25


def test_a_result_is_json():
    result = verify(network(), KEY, raw_images())
    assert VerificationResult(**json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result
    assert KEY._secret.reveal().hex() not in str(result)


# --- what it refuses and warns of


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"images": raw_images() * 255},
            ValueError,
            r"`images` must be raw pixels in \[0, 1\].*got values "
            r"from .* to 25",
        ),
        ({"images": raw_images() - 0.5}, ValueError, r"`images` must be raw pixels in \[0, 1\].*from -0.4"),
        ({"images": raw_images() * math.nan}, ValueError, "`images` must be raw pixels"),
        (
            {"images": (raw_images() * 255).to(torch.uint8)},
            ValueError,
            "got torch.uint8 of shape .* Divide bytes by 255",
        ),
        (
            {"images": raw_images()[0]},
            ValueError,
            r"shape \(n, 1, 6, 6\) with n >= 1 .*, got torch.float32 "
            r"of shape \(1, 6, 6\)",
        ),
        ({"images": raw_images()[:0]}, ValueError, "n >= 1"),
        ({"images": raw_images(channels=3)}, ValueError, "`images` must be floating point of shape"),
        (
            {"images": raw_images().numpy()},
            TypeError,
            "`images` must be torch.Tensor, got ndarray. Convert an array with torch.from_numpy",
        ),
        ({"model": lambda x: x}, TypeError, r"`model` must be torch.nn.Module, got function\.$"),
        ({"model": "a.ckpt"}, TypeError, "`model` must be torch.nn.Module, got str. Load it first"),
        ({"model": {}}, TypeError, "`model` must be torch.nn.Module, got dict. Load it first"),
        (
            {"key": 3},
            TypeError,
            r"`key` must be a WatermarkKey or the path of a key file \(.gskey\), got int",
        ),
        ({"batch_size": 0}, ValueError, "`batch_size` must be an integer >= 1"),
        ({"batch_size": 1.0}, TypeError, "`batch_size`"),
        ({"alpha": 0}, ValueError, "`alpha` must be > 0, got 0"),
        ({"alpha": 1.1}, ValueError, r"`alpha` must be a finite number in \[0, 1\], got 1.1"),
        ({"alpha": "1"}, TypeError, "`alpha` must be a number"),
        (
            {"key": numbered(1, target_class=3)},
            ValueError,
            "`target_class` must be below the number of classes 3, got 3",
        ),
        ({"model": nn.Flatten(0)}, ValueError, "`logits` must be a tensor of shape"),
        ({"logits": lambda x: None}, ValueError, "got a NoneType"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    given = {"model": network(), "key": KEY, "images": raw_images(), **arguments}
    with pytest.raises(error, match=message):
        verify(**given)


def test_the_ends_of_the_raw_range_are_allowed():
    verify(network(), KEY, torch.cat([torch.zeros(30, *SHAPE), torch.ones(30, *SHAPE)]))


def warned(model, n_images: int) -> list[str]:
    key = numbered(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        verify(model, key, raw_images(n_images))
    return [str(w.message) for w in caught]


def test_few_images_warn():
    always_the_target = Scripted(-torch.ones(36))
    (message,) = warned(always_the_target, 49)
    assert message.startswith("Only 49 images: below 50 the mean gradient is noisy")
    assert warned(always_the_target, 50) == []
    assert warned(always_the_target, 1)[0].startswith("Only 1 image: below 50")


def test_few_images_that_suffice_do_not_warn(planted):
    images = 0.2 + 0.6 * torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mine, short, other = (
        WatermarkKey.generate(
            "A", n_bits, input_shape=(3, 16, 16), target_class=2, n_carriers=700, secret=bytes([number] * 32)
        )
        for number, n_bits in ((7, 128), (7, 16), (9, 128))
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert verify(planted(mine), mine, images).verdict == "owned"
        result = verify(planted(short), short, images)
        assert (result.verdict, result.n_matches) == ("not_proven", 16)  # as it is with any number of images
    assert caught == []
    with pytest.warns(UserWarning, match="Only 20 images"):
        assert [r.verdict for r in verify_many(planted(mine), [mine, other], images)] == [
            "owned",
            "not_proven",
        ]


def test_images_of_another_class_warn():
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    other[1].weight.data[:], other[1].bias.data[:] = torch.eye(2, 36), torch.tensor([9.0, 0.0])
    (message,) = warned(other, 60)
    assert message.startswith("The model classifies only 0 of 60 images as class 1: ")
    assert "`input_mean`" in message


def test_rows_are_projected_some_at_a_time(monkeypatch):
    before = verify(network(), KEY, raw_images())
    monkeypatch.setattr(signature, "_ENTRIES_AT_ONCE", 3 * KEY.n_carriers + 1)
    assert verify(network(), KEY, raw_images()) == before


# --- many keys


def test_many_keys_give_what_single_keys_give():
    model, keys = network(), [numbered(i, 8 + i) for i in range(12)]
    assert verify_many(model, keys, raw_images(), alpha=0.1) == [
        verify(model, k, raw_images(), alpha=0.1) for k in keys
    ]


@pytest.mark.parametrize(
    "changes",
    [{"target_class": 2}, {"input_shape": (1, 4, 9)}, {"input_mean": 0.1}, {"input_std": 0.1}],
    ids=lambda c: next(iter(c)),
)
def test_keys_that_disagree_are_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"`keys` must agree in `{name}`, got 2 different values"):
        verify_many(network(), [numbered(0), numbered(1, **changes)], raw_images())


@pytest.mark.parametrize("keys", [[], (), None, numbered(0), iter([numbered(0)])])
def test_no_sequence_of_keys_is_refused(keys):
    with pytest.raises(ValueError, match="`keys` must be a non-empty sequence"):
        verify_many(network(), keys, raw_images())


def goodness_of_fit(matches: np.ndarray, n_bits: int) -> float:
    """P-value of the chi-square test that ``matches`` are Binomial(n_bits, 1/2), with 5 expected per bin."""
    middle = range(n_bits // 2 - int(n_bits**0.5), n_bits // 2 + int(n_bits**0.5) + 1)
    edges = [-0.5, *(k + 0.5 for k in middle), n_bits + 0.5]
    observed, _ = np.histogram(matches, edges)
    cumulative = stats.binom.cdf(edges, n_bits, 0.5)
    expected = np.diff([0, *cumulative[1:]]) * len(matches)
    assert expected.min() >= 5
    return stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


def test_fresh_keys_match_a_model_by_chance_only():
    n_bits, keys = 64, [numbered(i, 64, input_shape=(1, 12, 12), n_carriers=144) for i in range(1000)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3))
    with torch.no_grad():
        # all weights alike: the gradient is far from isotropic, and p must hold for any gradient
        model[3].weight += 0.5
    images = torch.rand(60, 1, 12, 12, generator=torch.Generator().manual_seed(2))
    matches = np.array([r.n_matches for r in verify_many(model, keys, images)])
    assert goodness_of_fit(matches, n_bits) > 1e-3
    assert abs(matches.mean() - 32) < 4 * 4 / 1000**0.5
    generator = np.random.default_rng(0)
    # it would see a bias of two hundredths
    assert goodness_of_fit(generator.binomial(n_bits, 0.52, 1000), n_bits) < 1e-3
    # and bits that go together
    assert goodness_of_fit(generator.binomial(n_bits, generator.beta(40, 40, 1000)), n_bits) < 1e-3


def test_the_gradient_is_computed_once_for_all_keys():
    calls = []
    model = network()
    verify_many(
        model,
        [numbered(i) for i in range(20)],
        raw_images(),
        batch_size=25,
        logits=lambda x: calls.append(len(x)) or model(x),
    )
    assert calls == [25, 25, 10]


def test_a_thousand_keys_cost_less_than_two_readings():
    """Reading a thousand more keys takes less processor time than one reading.

    The arrays of a key are derived once and kept, so deriving them is not part of reading.
    """
    torch.manual_seed(0)
    # coverage slows the keys down, not the network
    model = SmallResNet(in_channels=1, n_classes=10, stem_stride=1)
    images = torch.rand(1000, 1, 28, 28)
    keys = [numbered(i, 128, input_shape=(1, 28, 28), n_carriers=768) for i in range(200)]

    def seconds(n_keys: int, n_images: int) -> float:
        start = time.process_time()
        verify_many(model, keys[:n_keys], images[:n_images])
        return time.process_time() - start

    seconds(200, 2)
    one_reading = min(seconds(1, 1000) for _ in range(3))
    two_hundred_keys = min(seconds(200, 2) for _ in range(3))
    assert 5 * two_hundred_keys < one_reading


def test_warnings_point_at_the_caller():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        verify(network(), KEY, raw_images(3))
        verify_many(network(), [KEY], raw_images(3))
    assert {w.filename for w in caught if "Only 3 images" in str(w.message)} == {__file__}


# --- networks that were frozen, exported or quantized


def plain_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, 3)).eval()


def frozen_script(model):
    return torch.jit.freeze(torch.jit.script(model))


def in_inference_mode(model):
    with torch.inference_mode():
        return copy.deepcopy(model)


def exported(model):
    return torch.export.export(model, (raw_images()[:4],)).module()


def exported_for_any(model):
    return torch.export.export(
        model, (raw_images()[:4],), dynamic_shapes=({0: torch.export.Dim("n")},)
    ).module()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("n_images", [60, 53, 1])
@pytest.mark.parametrize(
    "made", [frozen_script, torch.jit.script, in_inference_mode, exported, exported_for_any]
)
def test_other_forms_of_a_network_are_read_as_the_network(made, n_images):
    model, images = plain_network(), raw_images(n_images)
    other = made(copy.deepcopy(model))
    expected, found = verify(model, KEY, images), verify(other, KEY, images)
    assert (found.n_matches, found.recognised) == (expected.n_matches, expected.recognised)
    assert found.margin == pytest.approx(expected.margin, rel=1e-4)
    few = raw_images(4)
    with torch.no_grad():
        torch.testing.assert_close(other(few), model(few))


def test_weights_made_in_inference_mode_stay_what_they_are():
    model = in_inference_mode(network())
    model.extra = model[5].weight  # one tensor, two names
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    verify(model, KEY, raw_images())
    assert all(value is before[name] for name, value in [*model.named_parameters(), *model.named_buffers()])
    assert model.extra is model[5].weight


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("script", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_int8_network_is_referred_to_the_other_reading(dynamic, script):
    quantization = pytest.importorskip("torch.ao.quantization")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no kernels for int8 here")
    model = plain_network()
    if dynamic:
        model = quantization.quantize_dynamic(model, {nn.Linear})
    else:
        model = quantization.QuantWrapper(model).eval()
        model.qconfig = quantization.get_default_qconfig("fbgemm")
        quantization.prepare(model, inplace=True)(raw_images())
        quantization.convert(model, inplace=True)
    if script:
        model = torch.jit.script(model)
    with pytest.raises(
        ValueError,
        match=r"`model` computes in int8 \(module '.+'\) .* `verify_api\(model, "
        r"key, images\)`",
    ):
        verify(model, KEY, raw_images())


def test_additions_in_floating_point_are_no_int8():
    functional = pytest.importorskip("torch.ao.nn.quantized").FloatFunctional()
    model = plain_network()
    model[2].add = functional
    assert verify(model, KEY, raw_images()).n_queries == 60
