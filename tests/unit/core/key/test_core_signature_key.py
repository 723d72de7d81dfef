"""What readers need of a key, and which images they accept for it."""

import pytest
import torch

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.core.key.signature_key import check_images

KEY = WatermarkKey.generate("A", 32, input_shape=(1, 8, 8), target_class=0, secret=bytes(32))


@pytest.mark.parametrize(
    ("images", "came"),
    [
        (torch.rand(2, 3, 8, 8), r"torch.float32 of shape \(2, 3, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), r"torch.uint8 of shape \(2, 1, 8, 8\)"),
        (torch.rand(1, 8, 8), r"torch.float32 of shape \(1, 8, 8\)"),
        (torch.rand(()), r"torch.float32 of shape \(\)"),
    ],
)
def test_images_of_another_kind_are_refused_with_the_keys_shape(images, came):
    with pytest.raises(
        ValueError,
        match=rf"`images` must be floating point of shape \(n, 1, 8, 8\) as the key's .* got "
        rf"{came}\.$",
    ):
        check_images(images, KEY.input_shape)


def test_too_few_are_refused_where_some_are_needed_and_the_hint_comes_last():
    none = torch.rand(0, 1, 8, 8)
    check_images(none, KEY.input_shape)
    check_images(torch.rand(1, 1, 8, 8).half(), KEY.input_shape, least=1)
    with pytest.raises(
        ValueError,
        match=r"\(n, 1, 8, 8\) with n >= 1 as .*shape \(0, 1, 8, 8\)\. Bring "
        r"some\.$",
    ):
        check_images(none, KEY.input_shape, least=1, hint="Bring some.")
