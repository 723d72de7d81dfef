"""One z, one verdict: what the callback logs, how a fit ends, the metrics, and what ``verify`` finds."""

import math

import lightning.pytorch as L
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from gradsigns_lightning import GradSigns, WatermarkKey, verify
from gradsigns_lightning.core.statistics import ownership_p_value
from gradsigns_lightning.core.torch_state import precision
from gradsigns_lightning.integration.reading import METRICS, HeldOutEstimator
from gradsigns_lightning.integration.standing import last_reading
from gradsigns_lightning.metrics import BitErrorRate, OwnershipPValue, SmallestMargin
from gradsigns_lightning.metrics import functional as M
from gradsigns_lightning.verification.suspects import read_scores
from gradsigns_lightning.verification.white_box import read_projections

SHAPE, T, N_BITS = (1, 16, 16), 1, 48
KEY = WatermarkKey.generate("A", N_BITS, input_shape=SHAPE, target_class=T, n_carriers=256, secret=bytes(32))
IMAGES = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0))
SIGNS = 2 * KEY.signature.float() - 1
PLANTED = torch.zeros(256).index_put((KEY.carriers,), KEY.projection.float().T @ SIGNS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Only", "ignore:The model classifies only", "ignore:.*no usable gradient"
)


class Linear(L.LightningModule):
    """Two logits, linear in the input, so that the loss's gradient points along ``direction``."""

    def __init__(self, direction, bias):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(-direction), bias

    def forward(self, x):
        logit = x.flatten(1) @ self.weight + self.bias
        return torch.stack([torch.zeros_like(logit), logit], 1)

    def validation_step(self, batch, batch_idx):
        pass


@st.composite
def directions(draw):
    kind = draw(st.sampled_from(["ties", "planted", "nothing", "not finite"]))
    if kind == "nothing":
        return torch.zeros(256)
    if kind == "planted":
        seed, noise = draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 1.0, 3.0]))
        return 0.01 * (PLANTED + noise * 7 * torch.randn(256, generator=torch.Generator().manual_seed(seed)))
    # Four or sixteen values of one size: at unit length they are powers of two, so that sums of them are
    # exactly zero.
    places = draw(st.lists(st.integers(0, 255), min_size=16, max_size=16, unique=True))[
        : draw(st.sampled_from([4, 16]))
    ]
    direction = torch.zeros(256)
    direction[places] = torch.tensor([draw(st.sampled_from([-1.0, 1.0])) for _ in places]) * draw(
        st.sampled_from([1e-3, 1.0])
    )
    if kind == "not finite":
        direction[places[0]] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    return direction


def logged_by(mark, model):
    batches = DataLoader(TensorDataset(IMAGES, torch.full((len(IMAGES),), T)), batch_size=4)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=[mark], **quiet)
    trainer.validate(model, batches, verbose=False)
    return trainer, {name: float(trainer.callback_metrics[f"wm/{name}"]) for name in METRICS}


def same(value, expected, **tolerance):
    return value == pytest.approx(expected, nan_ok=True, **{"rel": 1e-5, "abs": 1e-6, **tolerance})


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*`val_dataloader` contains", "ignore:Trying to infer"
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(direction=directions(), bias=st.sampled_from([-3.0, 5.0]))
def test_all_who_read_a_model_say_the_same(direction, bias):
    model, mark = Linear(direction, bias), GradSigns(KEY)
    result = verify(model, KEY, IMAGES)
    n_decided = result.n_bits - result.n_erasures
    z, _ = read_projections(model, KEY, IMAGES)
    trainer, logged = logged_by(mark, model)
    standing = last_reading(trainer, mark.reader, mark.watermarker)

    assert result.n_erasures == (int((z == 0).sum()) if z.isfinite().all() else N_BITS)
    assert same(logged["ber"], result.bit_error_rate)
    assert same(logged["p_value"], result.p_value, abs=1e-40)
    assert same(logged["log10_p_value"], result.log10_p_value)
    assert same(logged["margin"], result.margin)

    assert (standing is None) == (n_decided == 0)
    if standing is not None:
        assert (standing.n_bits, standing.n_matches, standing.n_erasures) == (
            N_BITS,
            result.n_matches,
            result.n_erasures,
        )
        assert (standing.bit_error_rate, standing.p_value) == (result.bit_error_rate, result.p_value)
        assert same(standing.margin, result.margin)
        assert standing.recognised == result.recognised
        assert standing.owned == (result.verdict == "owned")

    bits = M.bits_of(z)
    for metric, expected in ((BitErrorRate(), result.bit_error_rate), (OwnershipPValue(), result.p_value)):
        assert same(float(metric(bits, KEY.signature)), expected, abs=1e-40)
    assert same(float(M.bit_error_rate(bits, KEY.signature)), result.bit_error_rate)
    assert same(float(M.ownership_p_value(bits, KEY.signature)), result.p_value, abs=1e-40)
    for margin in (SmallestMargin()(z, KEY.signature), M.smallest_margin(z, KEY.signature)):
        assert same(float(margin), result.margin)

    scores, *_ = read_scores(model, KEY, IMAGES, max_queries=1)
    assert torch.from_numpy(scores).sign().tolist() == [{1: 1, 0: -1, -1: 0}[int(bit)] for bit in bits]


def test_the_examples_hold_ties_and_a_mark():
    places = KEY.carriers[:4]
    ties = torch.zeros(256).index_put((places,), torch.tensor([1.0, -1.0, 1.0, 1.0]))
    result = verify(Linear(ties, 5.0), KEY, IMAGES)
    assert 0 < result.n_erasures < N_BITS
    assert result.p_value == ownership_p_value(result.n_matches, N_BITS - result.n_erasures)
    assert verify(Linear(0.01 * PLANTED, 5.0), KEY, IMAGES).verdict == "owned"


def test_what_is_logged_is_float32_where_a_device_has_no_float64(monkeypatch):
    monkeypatch.setattr(precision, "_WITHOUT_FLOAT64", ("cpu",))
    reader, model = (
        HeldOutEstimator(KEY, GradSigns(KEY).watermarker.projector, len(IMAGES), None),
        Linear(0.01 * PLANTED, 5.0),
    )
    reader.start(torch.device("cpu"))
    reader.read(model, model, IMAGES, torch.full((len(IMAGES),), T))
    figures = reader.finish(step=0)
    assert {figure.dtype for figure in figures.values()} == {torch.float32}
    result = verify(model, KEY, IMAGES)
    for name, expected in (
        ("ber", result.bit_error_rate),
        ("log10_p_value", result.log10_p_value),
        ("margin", result.margin),
    ):
        assert same(float(figures[name]), expected)
