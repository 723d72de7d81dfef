"""Every reader refuses keys, images and models that do not fit together, and names their shapes."""

import re

import pytest
import torch
from torch import nn

from gradsigns_lightning import WatermarkKey, trace, verify, verify_api, verify_many
from gradsigns_lightning.core.key.signature_key import KeyAsRead

KEY = WatermarkKey.generate("A", 64, input_shape=(1, 12, 12), target_class=0, secret=bytes(32))
pytestmark = pytest.mark.filterwarnings("ignore:Only", "ignore:The model classifies only")
READERS = {
    "verify": verify,
    "verify_many": lambda model, key, images: verify_many(model, [key], images),
    "verify_api": verify_api,
    "trace": trace,
    "trace through an API": lambda model, key, images: trace(lambda x: model(x), key, images),
}


def classifier(size=144):
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 3))


def images(*shape):
    return torch.rand(60, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("shape", [(1, 10, 10), (3, 12, 12), (144, 1, 1), (144,)])
def test_images_of_another_shape_than_the_keys_are_refused(reader, shape):
    with pytest.raises(
        ValueError,
        match=r"`images` .* \(n, 1, 12, 12\) .*as the key's `input_shape` says, got .*"
        + re.escape(str((60, *shape))),
    ):
        READERS[reader](classifier(), KEY, images(*shape))


def test_images_with_channels_last_get_the_line_that_helps():
    with pytest.raises(ValueError, match=r"Channels come first: images.permute\(0, 3, 1, 2\)"):
        verify(classifier(), KEY, images(12, 12, 1))


@pytest.mark.parametrize("reader", ["verify", "verify_many", "verify_api", "trace"])
def test_a_model_that_takes_other_images_is_refused(reader):
    with pytest.raises(
        ValueError,
        match=r"`model` \(Sequential\) must take images .* \(1, 12, 12\).* it raised: .*x144 and "
        r"100x3.*\. Is this",
    ):
        READERS[reader](classifier(100), KEY, images(1, 12, 12))


def foreign_key(**changes):
    """A foreign key, whose arrays nobody has checked."""
    key = KeyAsRead.of(KEY, input_mean=0.0, input_std=1.0)
    return type("Stranger", (), {**vars(key), **changes})()


@pytest.mark.parametrize("reader", ["verify", "verify_many", "verify_api"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"carriers": KEY.carriers + 100},
            r"carriers \(c,\) in 0 to 143, as its `input_shape` \(1, 12, 12\) says, got 100 to 243",
        ),
        ({"carriers": KEY.carriers - 1}, "got -1 to 142"),
        ({"carriers": KEY.carriers[:0]}, "got none"),
        ({"carriers": KEY.carriers[:100]}, r"projection of shape \(64, 100\).*got \(64, 144\) and \(64,\)"),
        (
            {"projection": KEY.projection[:32]},
            r"projection of shape \(64, 144\).*got \(32, 144\) and \(64,\)",
        ),
        ({"signature": KEY.signature[:32]}, r"a signature of shape \(64,\).*got \(64, 144\) and \(32,\)"),
    ],
)
def test_a_key_whose_arrays_do_not_fit_together_is_refused(reader, changes, message):
    with pytest.raises(ValueError, match="`key` must have a?.*" + message):
        READERS[reader](classifier(), foreign_key(**changes), images(1, 12, 12))


@pytest.mark.parametrize("reader", ["verify", "verify_many", "verify_api"])
def test_a_strangers_key_that_fits_is_read(reader):
    READERS[reader](classifier(), foreign_key(), images(1, 12, 12))
