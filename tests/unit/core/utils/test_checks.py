"""Argument checks that several subpackages share."""

import pytest

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.core.utils.checks import check_shape
from gradsigns_lightning.data import Digits
from gradsigns_lightning.data.base import ImageDataModule
from gradsigns_lightning.models import MLP, ViT

TAKERS = {
    "key": lambda shape: WatermarkKey.generate("A", 32, input_shape=shape, target_class=0),
    "MLP": lambda shape: MLP(shape, 3),
    "ViT": lambda shape: ViT(shape, 3),
    "data module": lambda shape: _Data(input_shape=shape, n_classes=3, mean=(0.5,), std=(0.5,)),
}


class _Data(Digits):
    __init__ = ImageDataModule.__init__


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        (
            (8, 8),
            ValueError,
            r"`input_shape` must be three integers \(channels, height, width\), got \(8, 8\)",
        ),
        (64, ValueError, "three integers .*got 64"),
        ("188", ValueError, "three integers .*got '188'"),
        ((1, 0, 8), ValueError, "`input_shape` must be an integer >= 1, got 0"),
        ((1, 8.0, 8), TypeError, "`input_shape` must be an integer, got 8.0"),
    ],
    ids=str,
)
def test_a_wrong_input_shape_is_refused_alike_wherever_it_is_given(taker, shape, error, message):
    with pytest.raises(error, match=message):
        TAKERS[taker](shape)


def test_a_shape_comes_back_as_a_tuple():
    assert check_shape([1, 2, 3]) == (1, 2, 3)
