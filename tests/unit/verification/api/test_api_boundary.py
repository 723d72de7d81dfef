"""Which images are probed around: those near the decision boundary, and blends where there are none."""

import math

import pytest
import torch

from gradsigns_lightning.verification.api.boundary import BoundaryImages
from gradsigns_lightning.verification.api.queries import QueryBudget
from gradsigns_lightning.verification.api.responses import ResponseParser

SHAPE = (1, 4, 4)
STEP = 4
PER_GREY = 0.125  # the server's log-odds of class 1 per grey level; 0 at grey 128


def grey(*log_odds):
    """Images of one grey level each, for which the server's log-odds are as given."""
    return torch.stack([torch.full(SHAPE, round(128 + c / PER_GREY), dtype=torch.uint8) for c in log_odds])


def log_odds_of(images):
    return (images * 255 - 128).double().mean((1, 2, 3)) * PER_GREY


def logits(images):
    return torch.stack([torch.zeros(len(images)).double(), log_odds_of(images)], 1)


def rounded(decimals):
    return lambda images: logits(images).softmax(1).round(decimals=decimals)


def labels(images):
    return (log_odds_of(images) > 0).long()


class RecordedBoundary(BoundaryImages):
    """A boundary whose server records the images that it gets."""

    def __init__(self, images, predict, *, kind=None, max_queries=1000, direction=None):
        self.queried = []

        def server(batch):
            self.queried += list((batch * 255).round().to(torch.uint8))
            return predict(batch)

        self.budget = QueryBudget(
            server, ResponseParser(1, kind), max_queries=max_queries, batch_size=8, transcript=None
        )
        super().__init__(
            images, self.budget, direction=torch.zeros(SHAPE) if direction is None else direction, step=STEP
        )

    def all(self):
        found = []
        while (image := self.get(len(found))) is not None:
            found.append(image)
        return found


def log_odds_at(found):
    return [float(log_odds_of(image.image[None] / 255)) for image in found]


# --- what is near


@pytest.mark.parametrize(
    ("decimals", "most"),
    [(1, 2.0), (2, 1 - math.log(0.2)), (4, 1 - math.log(0.002))],
)
def test_near_is_up_to_where_rounding_still_shows_how_the_model_moves(decimals, most):
    log_odds = [-2.0, -1.5, -0.75, 0.5, 1.5, 2.25, 3.0, 5.0, 6.5, 7.75]
    found = RecordedBoundary(grey(*log_odds), rounded(decimals), kind="probabilities").all()
    natural = {c for c in log_odds_at(found) if c in log_odds}
    assert natural == {c for c in log_odds if -1 <= c <= most}


def test_an_image_comes_with_its_log_odds_and_within_the_range_of_a_step():
    images = torch.cat([grey(0.5), torch.full((1, *SHAPE), 255, dtype=torch.uint8)])
    boundary = RecordedBoundary(images, logits, kind="logits")
    boundary.get(0)
    assert sorted(int(image.max()) for image in boundary.queried) == [132, 255 - STEP]
    for found in boundary.all():
        assert found.log_odds == pytest.approx(float(log_odds_of(found.image[None] / 255)))


def test_the_most_typical_images_come_first():
    log_odds = [0.25, 1.0, 1.25, 3.0, 9.0]
    assert log_odds_at(RecordedBoundary(grey(*log_odds), logits, kind="logits").all()) == [
        1.25,
        1.0,
        0.25,
        3.0,
        9.0,
    ]


def test_at_a_high_temperature_the_median_counts_as_the_boundary():
    log_odds = [-4.0, -3.0, -2.0, -1.5, -1.0]
    found = log_odds_at(RecordedBoundary(grey(*log_odds), logits, kind="logits").all())
    assert set(found) == {-3.0, -2.0, -1.5, -1.0}  # down to 1 below the median


# --- blends

# two decimals still tell these from 1, but not how they move
SURE, MOST = (3.5, 3.75, 4.0), 1 - math.log(20 * 0.01)


def test_an_image_on_which_the_model_is_too_confident_is_blended_towards_another_class():
    found = RecordedBoundary(grey(*SURE, *(-c for c in SURE)), rounded(2), kind="probabilities").all()
    assert len(found) == len(SURE)
    assert all(-1 <= c <= MOST for c in log_odds_at(found))


def test_each_blend_takes_another_image_of_another_class():
    """Probes around two blends with the same image would share a deviation that is not the signature."""
    marks = torch.zeros(2, *SHAPE, dtype=torch.uint8)
    marks[0, 0, 0, :2], marks[1, 0, 3, 2:] = 40, 40
    other_class = grey(-4.0, -4.0) + marks
    found = RecordedBoundary(
        torch.cat([grey(3.5, 3.75), other_class]), rounded(2), kind="probabilities"
    ).all()
    assert [
        sum(bool(image.image[0, y, x] > image.image[0, 1, 1]) for y, x in ((0, 0), (3, 3))) for image in found
    ] == [1, 1]
    assert not torch.equal(found[0].image > found[0].image[0, 1, 1], found[1].image > found[1].image[0, 1, 1])


def by_order(images):
    """Confident of class 1 as long as the upper half is the brighter one."""
    upper, lower = images[:, :, :2].double().mean((1, 2, 3)), images[:, :, 2:].double().mean((1, 2, 3))
    return (
        torch.stack([torch.zeros(len(images)).double(), 10 * (upper - lower) - 3], 1)
        .softmax(1)
        .round(decimals=2)
    )


def test_without_images_of_another_class_an_image_is_blended_with_its_own_shuffled_pixels():
    image = torch.full((1, *SHAPE), 40, dtype=torch.uint8)
    image[:, :, :2] = 215
    (found,) = RecordedBoundary(image, by_order, kind="probabilities").all()
    assert -1 <= found.log_odds <= MOST
    # of one grey, shuffled it is the same
    assert RecordedBoundary(grey(3.5), rounded(2), kind="probabilities").all() == []


# --- labels


def test_where_only_labels_come_back_the_boundary_itself_is_probed():
    boundary = RecordedBoundary(grey(9.0, 8.0, 7.0, -7.0, -8.0, -9.0), labels)
    found = boundary.all()
    assert len(found) == 3
    assert all(math.isnan(image.log_odds) for image in found)
    assert all(abs(c) <= 18 / 2**6 for c in log_odds_at(found))


def test_a_typical_probes_label_tells_the_boundary():
    """The server sees probes with a common shift; half of their labels must turn, not half of the images'."""
    direction = torch.full(SHAPE, 2.0)
    found = log_odds_at(RecordedBoundary(grey(9.0, -9.0), labels, direction=direction).all())
    assert found == pytest.approx([-2 * STEP * PER_GREY], abs=18 / 2**6)


def test_after_the_boundary_two_values_stay_labels():
    def one_hot(images):
        return torch.nn.functional.one_hot(labels(images), 2).double()

    boundary = RecordedBoundary(grey(9.0, -9.0), one_hot)
    assert boundary.get(0) is not None
    boundary.budget.parser.log_odds(torch.tensor([[0.25, 0.75]]).numpy())
    assert boundary.budget.parser.kind == "labels"


def test_a_confident_models_rounded_scores_are_found_out_on_the_way_to_the_boundary():
    boundary = RecordedBoundary(grey(9.0, -9.0), rounded(2))
    (found,) = boundary.all()
    assert boundary.budget.parser.kind == "probabilities"
    assert -1 <= found.log_odds <= MOST


# --- whether the model recognises the images, and the budget


@pytest.mark.parametrize(("n_inside", "n_classified"), [(28, 8), (10, 32), (0, 32)])
def test_in_doubt_more_images_are_screened(n_inside, n_classified):
    images = (
        grey(*[1.0] * n_inside * 2, *[-1.0] * (80 - 2 * n_inside)) if n_inside < 28 else grey(*[1.0] * 80)
    )
    boundary = RecordedBoundary(images, logits, kind="logits")
    assert math.isnan(boundary.recognised)
    boundary.get(0)
    assert boundary.n_classified == n_classified
    inside = sum(float(log_odds_of(image[None] / 255)) > 0 for image in boundary.queried[:n_classified])
    assert boundary.recognised == inside / n_classified


def test_blends_are_not_counted_as_natural_images():
    boundary = RecordedBoundary(grey(3.5, 3.75, -3.5, -3.75), rounded(2), kind="probabilities")
    boundary.all()
    assert (boundary.recognised, boundary.n_classified) == (0.5, 4)
    assert len(boundary.queried) > 4


def test_images_that_suffice_are_not_asked_for_more():
    boundary = RecordedBoundary(grey(*[1.0] * 40), logits, kind="logits")
    assert boundary.get(7) is not None
    assert (len(boundary.queried), boundary.size) == (8, 8)
    assert boundary.get(8) is not None
    assert len(boundary.queried) == 16


@pytest.mark.parametrize("max_queries", [1, 8, 11])
def test_a_spent_budget_ends_the_search(max_queries):
    boundary = RecordedBoundary(
        grey(*[3.5] * 10, *[-3.5] * 10), rounded(2), kind="probabilities", max_queries=max_queries
    )
    boundary.all()
    assert len(boundary.queried) == max_queries
    assert boundary.get(boundary.size) is None


def test_the_order_of_images_is_fixed():
    images = grey(*[c / 8 for c in range(40)])
    first, second = (
        RecordedBoundary(images, logits, kind="logits"),
        RecordedBoundary(images, logits, kind="logits"),
    )
    for boundary in (first, second):
        boundary.get(39)
    assert torch.equal(torch.stack(first.queried), torch.stack(second.queried))
    # not as given: a folder's order is its files' names
    assert not torch.equal(torch.stack(first.queried), images)
