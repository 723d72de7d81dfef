"""What message a model carries."""

import pytest
import torch

from gradsigns_lightning import WatermarkKey, message_key, read_message

pytest.importorskip("galois")

SHAPE = (3, 16, 16)
MASTER = WatermarkKey.generate("A", 128, input_shape=SHAPE, target_class=2, n_carriers=700, secret=bytes(32))
IMAGES = 0.2 + 0.6 * torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(1))


def scores(model):
    return lambda x: model(x).softmax(1).detach()


def test_a_message_is_read_back_through_wrong_bits(planted):
    clean = read_message(planted(message_key(MASTER, "v2.1")), MASTER, IMAGES)
    assert (clean.text, clean.n_correctable) == ("v2.1", 15)
    noisy = read_message(planted(message_key(MASTER, "ok"), noise=2.5), MASTER, IMAGES)
    assert noisy.text == "ok"
    assert noisy.n_corrected > 0
    assert read_message(scores(planted(message_key(MASTER, "api"))), MASTER, IMAGES).text == "api"


def test_no_message_is_invented(planted):
    other = WatermarkKey.generate(
        "B", 128, input_shape=SHAPE, target_class=2, n_carriers=700, secret=bytes([1] * 32)
    )
    with pytest.raises(ValueError, match=r"no codeword within 15 errors|carries no message"):
        read_message(planted(other), MASTER, IMAGES)


def test_images_of_another_class_carry_no_message(planted):
    model = planted(message_key(MASTER, "v2.1"))

    class Turned(torch.nn.Module):
        def forward(self, x):
            return model(x).roll(1, 1)

    with pytest.raises(ValueError, match="`images` must be of the target class"):
        read_message(Turned(), MASTER, IMAGES)
