"""Why a reading through an API ended, in words."""

import pytest
import torch

from gradsigns_lightning import WatermarkKey, verify_api

SHAPE, T = (3, 16, 16), 2
pytestmark = pytest.mark.filterwarnings("ignore:Only", "ignore:The model classifies only")
IMAGES = 0.2 + 0.6 * torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(1))


def key_number(i):
    return WatermarkKey.generate(
        "A", 64, input_shape=SHAPE, target_class=T, n_carriers=384, secret=i.to_bytes(32, "big")
    )


KEY = key_number(7)


@pytest.fixture(scope="module")
def model(planted):
    return planted(KEY)


def test_a_reading_through_an_api(model):
    result = verify_api(lambda x: model(x).argmax(1), KEY, IMAGES)
    verdict, bits, read = str(result).split("\n")
    assert verdict == "owned: p <= alpha = 1e-09, so reading stopped"
    assert bits == f"{result.n_matches} of 64 bits match, p = {result.p_value:.2g}"
    assert read.startswith(f"{result.n_queries} queries, probes around {result.n_images} images")
    assert "answers read as labels" in read


@pytest.mark.parametrize(
    ("settings", "images", "stopped", "words"),
    [
        ({"max_queries": 100}, IMAGES, "budget", "`max_queries` were spent: more of them may suffice"),
        ({"max_queries": 2000}, IMAGES, "futile", "the rest of the budget could no longer suffice"),
        (
            {"max_queries": 20_000, "alpha": 1e-15},
            IMAGES[:4],
            "images",
            "all images were used up: more of them may suffice",
        ),
    ],
)
def test_why_a_reading_through_an_api_stopped(model, settings, images, stopped, words):
    result = verify_api(lambda x: model(x).detach(), key_number(200), images, **settings)
    assert (result.stopped, result.verdict) == (stopped, "not_proven")
    assert str(result).split("\n")[0].endswith(f"and reading stopped because {words}")
