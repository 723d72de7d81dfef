"""What the responses of a model with known slopes say about each bit, and how many queries that takes."""

import numpy as np
import pytest
import torch

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.verification.api.boundary import BoundaryImages, ProbeImage
from gradsigns_lightning.verification.api.estimators import FIRST_STEP, CoordinateEstimator, RowEstimator
from gradsigns_lightning.verification.api.queries import QueryBudget
from gradsigns_lightning.verification.api.responses import ResponseParser

SHAPE, N_ROWS = (1, 4, 8), 16
# Row k is pixels 2k and 2k + 1: the server's slope along one row does not affect the others.
ROWS = torch.repeat_interleave(torch.eye(N_ROWS), 2, dim=1).view(N_ROWS, *SHAPE)
BITS = torch.tensor([1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0])
SIGNS = 2.0 * BITS - 1
KEY = WatermarkKey.generate("A", 8, input_shape=SHAPE, target_class=0, n_carriers=30, secret=bytes(32))


def images(n, seed=0):
    """Images of class 1 with grey levels around the middle."""
    return torch.randint(
        100, 156, (n, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def along_rows(x):
    """How far each image lies from the middle grey along each row, in grey levels."""
    return (x * 255 - 128).double().flatten(1) @ ROWS.flatten(1).double().T / 2


def linear(slopes, offset=1.0):
    """A server whose loss -log p rises along row k by ``slopes[k]``, in log-odds per grey level."""
    return lambda x: offset - along_rows(x) @ torch.as_tensor(slopes).double()


def two_logits(log_odds):
    return lambda x: torch.stack([torch.zeros(len(x)).double(), log_odds(x)], 1)


class Reading:
    """One estimator with its budget and its boundary; records the images that the server gets."""

    def __init__(
        self,
        predict,
        *,
        n_images=4,
        max_queries=10_000,
        kind=None,
        make=RowEstimator,
        directions=ROWS,
        **options,
    ):
        self.queried = []

        def server(batch):
            self.queried += list(batch)
            return predict(batch)

        self.budget = QueryBudget(
            server, ResponseParser(1, kind), max_queries=max_queries, batch_size=24, transcript=None
        )
        self.boundary = BoundaryImages(images(n_images), self.budget, direction=ROWS[0], step=FIRST_STEP)
        self.estimator = make(self.budget, self.boundary, directions, **options)

    def around(self, n_images):
        """Advance until the probes around ``n_images`` images are queried; return the scores."""
        while self.estimator.n_images < n_images or self.n_open:
            assert self.estimator.advance()
        return self.estimator.scores()

    @property
    def n_open(self):
        return self.estimator.n_probes % N_ROWS


def logits(slopes, **options):
    return Reading(two_logits(linear(slopes)), kind="logits", **options)


# --- rows: signs


@pytest.mark.parametrize("n_images", [1, 2, 3])
def test_a_loss_that_rises_along_a_row_is_evidence_for_a_one(n_images):
    scores = logits(0.02 * SIGNS).around(n_images)
    assert np.sign(scores).tolist() == SIGNS.tolist()
    # each image counts in units of its own spread
    np.testing.assert_allclose(np.abs(scores), n_images, rtol=0.05)


def test_a_steeper_row_is_stronger_evidence():
    scores = logits(SIGNS * torch.linspace(0.01, 0.04, N_ROWS)).around(2)
    assert (np.diff(scores[BITS == 1]) > 0).all()
    assert (np.diff(scores[BITS == 0]) < 0).all()


def test_curvature_cancels_from_image_to_image():
    bends = torch.linspace(-1, 1, N_ROWS).double() * 4e-3
    centred = Reading(two_logits(lambda x: 1 + (along_rows(x) ** 2) @ bends), kind="logits", n_images=2)
    centred.boundary._images = torch.full((2, *SHAPE), 128, dtype=torch.uint8)
    one = centred.around(1)
    two = centred.around(2)
    assert np.abs(one).max() > 1
    assert np.abs(two).max() < 0.2


def test_labels_are_evidence_too():
    label = lambda x: (linear(0.02 * SIGNS, offset=0.0)(x) > 0).long()  # noqa: E731
    reading = Reading(label, n_images=12)
    while reading.estimator.advance():
        pass
    assert np.sign(reading.estimator.scores()).tolist() == SIGNS.tolist()


def test_a_few_odd_labels_count_no_more_than_many():
    """One odd label of sixteen lies four deviations off; so weighted, it would outweigh four images."""
    odd = [0.5, *[0.0] * (N_ROWS - 1)]
    reading = Reading(lambda x: (linear(odd, offset=1.0)(x) > 0).long(), kind="labels", n_images=1)
    reading.boundary._ready = [ProbeImage(torch.full(SHAPE, 128, dtype=torch.uint8), float("nan"))]
    scores = reading.around(1)
    assert scores[0] == pytest.approx((1 - 1 / N_ROWS) / 0.35)


# --- rows: which queries are made


def test_a_bit_costs_one_query_an_image():
    reading = logits(0.02 * SIGNS)
    reading.around(2)
    assert reading.estimator.n_probes == 2 * N_ROWS
    screening, repeats = 4, 1
    assert reading.budget.n_queries == len(reading.queried) == 2 * N_ROWS + screening + repeats


def test_probes_lie_on_one_side_of_an_image_and_on_the_other_of_the_next():
    reading = logits(0.02 * SIGNS)
    reading.around(2)
    probes = torch.stack(reading.queried[-2 * N_ROWS :]).view(2, N_ROWS, -1) * 255
    away = (probes - probes.median(1, keepdim=True).values).round()
    step = reading.estimator.step
    assert [side.unique().tolist() for side in away] == [[0, step], [-step, 0]]
    assert (away != 0).sum(2).eq(2).all()  # along one row each


def test_all_rows_are_asked_once_an_image_in_an_order_that_is_fixed():
    first, second = logits(0.02 * SIGNS), logits(-0.02 * SIGNS)
    for reading in (first, second):
        reading.around(1)
    # A reading's queries do not depend on what the responses say about the bits.
    assert torch.equal(torch.stack(first.queried[-N_ROWS:]), torch.stack(second.queried[-N_ROWS:]))


def test_an_alignment_turns_the_probes_and_not_the_images():
    plain, turned = logits(0.02 * SIGNS), logits(0.02 * SIGNS, align=lambda x: x.flip(-1))
    for reading in (plain, turned):
        reading.around(1)
    base = torch.stack(plain.queried[-N_ROWS:]).median(0).values
    expected = torch.stack(plain.queried[-N_ROWS:]) - base
    torch.testing.assert_close(torch.stack(turned.queried[-N_ROWS:]) - base, expected.flip(-1))


def test_every_image_is_probed_on_both_sides_and_then_it_ends():
    reading = logits(0.02 * SIGNS, n_images=2)
    reading.around(4)
    assert not reading.estimator.advance()
    assert (reading.estimator.n_images, reading.estimator.n_probes) == (4, 4 * N_ROWS)


def test_the_step_grows_where_answers_hardly_differ_and_ends_at_64():
    faint, clear = logits(1e-4 * SIGNS), logits(0.02 * SIGNS)
    clear.around(1)
    assert clear.estimator.step == FIRST_STEP
    steps = [faint.estimator.step for _ in range(5) if faint.estimator.advance()]
    assert steps == [8, 16, 32, 64, 64]


# --- rows: responses that say little


def test_noise_of_the_server_is_taken_off_the_evidence():
    """Each image would add one to every bit's score; repeated queries of one image show that all is noise."""
    squares = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)

        def noisy(x, generator=generator):
            p = 0.6 + 0.05 * torch.randn(len(x), generator=generator).double()
            return torch.stack([1 - p, p], 1)

        reading = Reading(noisy, kind="probabilities", n_images=6)
        while reading.estimator.advance():
            pass
        squares.append(np.mean(reading.estimator.scores() ** 2) / reading.estimator.n_images)
    assert np.mean(squares) < 0.5


@pytest.mark.parametrize("constant", [0.6, 1 / 3])
def test_answers_that_are_all_alike_are_no_evidence(constant):
    reading = Reading(
        lambda x: torch.tensor([[1 - constant, constant]]).expand(len(x), 2), kind="probabilities"
    )
    while reading.estimator.advance():
        pass
    assert not reading.estimator.scores().any()


def test_missing_answers_are_no_evidence():
    server = two_logits(linear(0.02 * SIGNS))
    reading = Reading(server, kind="logits", max_queries=4 + 1 + 10)
    reading.estimator.advance()
    reading.estimator.advance()
    scores = reading.estimator.scores()
    assert np.isfinite(scores).all()
    assert (scores != 0).sum() == 10
    known = scores != 0
    assert np.sign(scores[known]).tolist() == SIGNS.numpy()[known].tolist()


# --- the published estimator


def test_the_published_estimator_projects_the_gradient():
    gradient = torch.linspace(-0.02, 0.03, 32).double()
    log_odds = lambda x: 1 - (x * 255 - 128).double().flatten(1) @ gradient  # noqa: E731
    reading = Reading(two_logits(log_odds), kind="logits", make=CoordinateEstimator, directions=KEY)
    while reading.estimator.n_images < 2 or reading.estimator.n_probes < 2 * 2 * 30:
        assert reading.estimator.advance()
    expected = KEY.projection.double() @ gradient[KEY.carriers]
    np.testing.assert_allclose(reading.estimator.scores(), 2 * 2 * 32 * expected, rtol=1e-4)


def test_the_published_estimator_asks_twice_a_carrier():
    reading = Reading(
        two_logits(linear(0.02 * SIGNS)), kind="logits", make=CoordinateEstimator, directions=KEY, n_images=2
    )
    while reading.estimator.advance():
        pass
    assert (reading.estimator.n_images, reading.estimator.n_probes) == (2, 2 * 2 * 30)
    assert reading.budget.n_queries == 2 * 2 * 30 + 2  # the boundary's screening, once


def test_an_answer_that_is_missing_is_no_slope():
    reading = Reading(
        two_logits(linear(0.02 * SIGNS)),
        kind="logits",
        make=CoordinateEstimator,
        directions=KEY,
        max_queries=4 + 7,
    )
    reading.estimator.advance()
    assert np.isfinite(reading.estimator.scores()).all()
