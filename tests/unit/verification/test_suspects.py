"""Which reader reads a suspect, and what readers share."""

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from gradsigns_lightning import (
    ApiVerificationResult,
    VerificationResult,
    WatermarkKey,
    read_message,
    trace,
    verify,
    verify_api,
)
from gradsigns_lightning.evidence import Bundle, judge, make_statement
from gradsigns_lightning.verification.images import pixels_of
from gradsigns_lightning.verification.suspects import read, read_scores

SHAPE, T = (1, 12, 12), 1
KEY = WatermarkKey.generate("A", 64, input_shape=SHAPE, target_class=T, n_carriers=144, secret=bytes(32))
IMAGES = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:Only", "ignore:The model classifies only", "ignore:A key of")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.Softplus(), nn.Linear(8, 3))


def judged(suspect=None, controls=None):
    bundle = Bundle(key=KEY, statement=make_statement([KEY], Ed25519PrivateKey.generate()))
    return judge(bundle, suspect=suspect, images=IMAGES, controls=controls, max_queries=50)


def test_a_module_is_read_from_its_weights_and_anything_else_by_its_answers(model):
    assert read(model, KEY, IMAGES, alpha=1e-9, max_queries=50) == verify(model, KEY, IMAGES)
    answers = read(lambda x: model(x).detach(), KEY, IMAGES, alpha=1e-9, max_queries=50)
    assert isinstance(answers, ApiVerificationResult)
    assert not isinstance(answers, VerificationResult)  # whose `n_bits` are the key's
    assert answers == verify_api(lambda x: model(x).detach(), KEY, IMAGES, max_queries=50)
    scores, n_queries, recognised, n_classified = read_scores(model, KEY, IMAGES, max_queries=50)
    assert (n_queries, n_classified, recognised) == (20, 20, read(model, KEY, IMAGES, alpha=1e-9).recognised)
    assert (scores > 0).sum() > 0


@pytest.mark.parametrize(
    ("argument", "reader"),
    [
        ("suspect", lambda given: judged(given)),
        ("controls", lambda given: judged(nn.Sequential(nn.Flatten(), nn.Linear(144, 3)), {"c": given})),
        ("suspect", lambda given: trace(given, KEY, IMAGES)),
        ("suspect", lambda given: read_message(given, KEY, IMAGES)),
        ("predict", lambda given: verify_api(given, KEY, IMAGES)),
    ],
)
@pytest.mark.parametrize(
    ("given", "hint"), [("a.ckpt", " Load it first"), ({"w": 1}, " Load it first"), (7, "$")]
)
def test_what_is_no_suspect_is_refused_by_the_name_of_its_argument(argument, reader, given, hint):
    with pytest.raises(
        TypeError,
        match=rf"^`{argument}` must be a module or a callable, got "
        rf"{type(given).__name__}\.{hint}",
    ):
        reader(given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_8_bits_stay_what_they_are(dtype):
    levels = torch.arange(256).view(1, 1, 16, 16)
    pixels = pixels_of(levels.to(dtype) / 255)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels.int(), levels)
    between = pixels_of((levels.to(dtype)[..., :-1] + 0.4) / 255)
    assert torch.equal(between.int(), levels[..., :-1])
