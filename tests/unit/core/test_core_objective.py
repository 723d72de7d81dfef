"""Objectives: values computed by hand, derivatives, and which keys they refuse."""

import math

import pytest
import torch

from gradsigns_lightning import MarginObjective, PaperObjective, WatermarkKey
from gradsigns_lightning.core.objective import make_objective
from gradsigns_lightning.core.signature import SignatureProjector, unit


def key(n_bits=8, n_carriers=24, **more) -> WatermarkKey:
    return WatermarkKey.generate(
        "A", n_bits, input_shape=(1, 6, 6), target_class=0, n_carriers=n_carriers, secret=bytes(32), **more
    )


def projector_of(rows, bits) -> SignatureProjector:
    projection = torch.tensor(rows, dtype=torch.float64)
    signs = torch.tensor(bits, dtype=torch.float64) * 2 - 1
    return SignatureProjector(
        torch.arange(projection.shape[1]), torch.ones(projection.shape[1]), projection, signs
    )


ROWS, BITS = [[1.0, 1.0], [1.0, -1.0]], [1, 1]


def test_margin_by_hand():
    gradient = torch.tensor([3.0, 4.0], dtype=torch.float64)  # unit length: (0.6, 0.8); z = (1.4, -0.2)
    value = MarginObjective(0.5)(gradient, projector_of(ROWS, BITS))
    assert value.item() == pytest.approx(math.sqrt((0.0 + 0.7**2) / 2))
    assert MarginObjective(2.0)(gradient, projector_of(ROWS, [0, 1])).item() == pytest.approx(
        math.sqrt((3.4**2 + 2.2**2) / 2)
    )


def test_the_last_missing_bit_keeps_its_pull():
    """One wrong bit of N weighs 1/sqrt(N), not 1/N as in a mean; none has a derivative of 0, not NaN."""

    class Fixed:
        signs = torch.ones(100)

        def project(self, z):
            return z

    for missing in (1e-3, 1.0):
        z = torch.full((100,), 2.0)
        z[3] = 0.5 - missing
        (pull,) = torch.autograd.grad(MarginObjective(0.5)(z.requires_grad_(), Fixed()), z)
        assert pull[3].item() == pytest.approx(-0.1, rel=1e-3)
        assert not pull[torch.arange(100) != 3].any()
    z = torch.full((100,), 2.0, requires_grad=True)
    value = MarginObjective(0.5)(z, Fixed())
    (pull,) = torch.autograd.grad(value, z)
    assert value == 0
    assert not pull.any()


def test_margin_ignores_the_scale():
    gradient = torch.tensor([3.0, 4.0], dtype=torch.float64)
    values = {
        round(MarginObjective()(s * gradient, projector_of(ROWS, BITS)).item(), 12)
        for s in (1e-12, 1.0, 1e12)
    }
    assert len(values) == 1


def test_paper_by_hand():
    gradient = torch.tensor([3.0, 4.0], dtype=torch.float64)  # z = (7, -1)
    value = PaperObjective()(gradient, projector_of(ROWS, BITS))
    assert value.item() == pytest.approx((math.log1p(math.exp(-7)) + math.log1p(math.exp(1))) / 2)
    value = PaperObjective()(gradient, projector_of(ROWS, [0, 0]))
    assert value.item() == pytest.approx((math.log1p(math.exp(7)) + math.log1p(math.exp(-1))) / 2)


@pytest.mark.parametrize("objective", [MarginObjective(0.9), PaperObjective()])
def test_first_and_second_derivatives(objective):
    projector = SignatureProjector.from_key(key(), dtype=torch.float64)
    gradient = torch.randn(
        24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: objective(g, projector), gradient)
    assert torch.autograd.gradgradcheck(lambda g: objective(g, projector), gradient)


@pytest.mark.parametrize("objective", [MarginObjective(), PaperObjective()])
def test_a_zero_gradient_has_finite_derivatives(objective):
    projector = SignatureProjector.from_key(key())
    gradient = torch.zeros(24, requires_grad=True)
    objective(gradient, projector).backward()
    assert bool(gradient.grad.isfinite().all())


def test_margin_is_satisfied_when_every_bit_is_beyond_it():
    gradient = torch.tensor([4.0, 3.0], dtype=torch.float64)  # z = (1.4, 0.2)
    assert MarginObjective(0.19).satisfied(gradient, projector_of(ROWS, BITS))
    assert not MarginObjective(0.21).satisfied(gradient, projector_of(ROWS, BITS))
    assert not MarginObjective(0.19).satisfied(gradient, projector_of(ROWS, [1, 0]))
    assert not MarginObjective(0.19).satisfied(gradient * math.nan, projector_of(ROWS, BITS))


def test_margin_is_zero_exactly_when_satisfied():
    projector = projector_of(ROWS, BITS)
    assert MarginObjective(0.19)(torch.tensor([4.0, 3.0], dtype=torch.float64), projector).item() == 0


def test_paper_is_never_satisfied():
    assert not PaperObjective().satisfied(
        torch.tensor([1e9, 1e9], dtype=torch.float64), projector_of(ROWS, [1, 1])
    )


def test_an_unattainable_margin_is_refused():
    # sqrt((24 - 8 - 1) / 8) = 1.369
    MarginObjective(1.369).check_key(key())
    with pytest.raises(
        ValueError,
        match=r"`margin` must be at most sqrt.* = 1.369 for 8 bits on 24 carriers, got 1.37\. "
        r"Take more carriers",
    ):
        MarginObjective(1.37).check_key(key())
    with pytest.raises(ValueError, match=r"= 0\.000 for 8 bits on 9 carriers"):
        MarginObjective(0.01).check_key(key(n_carriers=9))


@pytest.mark.parametrize("n_carriers", [8, 9, 36])
def test_paper_takes_every_key(n_carriers):
    assert PaperObjective().check_key(key(n_carriers=n_carriers)) is None


def test_the_attainable_margin_is_about_right():
    """The shortest g with E g = signs has length about sqrt(N / (c - N - 1)) (inverse Wishart)."""
    lengths = []
    for i in range(200):
        k = WatermarkKey.generate(
            "A", 8, input_shape=(1, 6, 6), target_class=0, n_carriers=24, secret=i.to_bytes(32, "big")
        )
        projector = SignatureProjector.from_key(k, dtype=torch.float64)
        lengths.append(
            torch.linalg.lstsq(projector.projection, projector.signs[:, None], driver="gelsd")
            .solution.square()
            .sum()
        )
    assert torch.stack(lengths).mean().item() == pytest.approx(8 / 15, rel=0.1)


@pytest.mark.parametrize(
    ("margin", "error"),
    [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError), ("1", TypeError), (True, TypeError)],
)
def test_bad_margins_are_named(margin, error):
    with pytest.raises(error, match="`margin` must be"):
        MarginObjective(margin)


def test_objectives_by_name():
    own = PaperObjective()
    roomy, dense = (
        WatermarkKey.generate("A", n, input_shape=(1, 8, 8), n_carriers=60, target_class=0) for n in (8, 40)
    )
    assert make_objective("margin", roomy) == MarginObjective(1.0)
    assert make_objective("margin", dense).margin == pytest.approx(0.7 * math.sqrt(19 / 40))
    make_objective("margin", dense).check_key(dense)
    assert make_objective("paper", roomy) == PaperObjective()
    assert make_objective(own, roomy) is own
    with pytest.raises(ValueError, match=r"`objective` must be one of .*'margin', 'paper'.*, got 'hinge'"):
        make_objective("hinge", roomy)


def test_unit_is_one_long_or_zero():
    assert unit(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.6, 0.8])
    assert unit(torch.zeros(2)).tolist() == [0, 0]
    assert unit(torch.tensor([3e-30, 4e-30])).tolist() == pytest.approx([0.6, 0.8])  # their squares underflow


def test_the_projector_scales_gradients_back_to_raw_pixels():
    k = WatermarkKey.generate(
        "A", 8, input_shape=(2, 3, 3), target_class=0, n_carriers=18, input_std=[0.5, 4.0]
    )
    gradient = torch.ones(2, 3, 3)
    expected = [2.0] * 9 + [0.25] * 9
    projector = SignatureProjector.from_key(k)
    raw = projector.raw(gradient.expand(5, 2, 3, 3))
    assert raw.tolist() == [expected] * 5
    assert projector.carrier_gradient(raw[0]).tolist() == expected
    assert projector.carrier_gradient(raw[0].view(2, 3, 3)).tolist() == expected
    torch.testing.assert_close(
        projector.directions(gradient.expand(5, 2, 3, 3)), raw / raw.norm(dim=1, keepdim=True)
    )


def test_a_projector_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        projector = SignatureProjector.from_key(key())
    gradient = torch.randn(1, 6, 6, requires_grad=True)
    MarginObjective()(projector.carrier_gradient(gradient), projector).backward()
    assert gradient.grad is not None
