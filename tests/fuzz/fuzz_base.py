"""What the fuzzer's targets share."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_mutation as plain

FOLDER = Path(tempfile.mkdtemp(prefix="gradsigns-fuzz-")).resolve()
SHAPE = (1, 4, 5)


@dataclass
class Reader:
    """How one kind of input is read.

    ``write`` puts an input where ``read`` expects it; ``unpack`` turns it into plain values, ``pack`` back.
    """

    read: Callable[[bytes], Any]
    seeds: list[bytes]
    write: Callable[[bytes], Any] = lambda data: None
    unpack: Callable[[bytes], Any] = plain.from_json
    pack: Callable[[Any], bytes] = plain.to_json
    errors: tuple[type[Exception], ...] = (ValueError,)
    warm_up: tuple[bytes, ...] = (b"", b"\x00", b"{}", b"[]\n")


def owned():
    """Return a key, images of its shape, and a signer; the same in every run."""
    import torch
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from gradsigns_lightning import WatermarkKey

    key = WatermarkKey.generate("A", 8, input_shape=SHAPE, target_class=1, secret=bytes(32))
    images = (torch.rand(9, *SHAPE, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    return key, images, Ed25519PrivateKey.from_private_bytes(bytes(32))


def predict(images):
    """A model of two classes."""
    import torch

    return torch.stack([images.flatten(1).mean(1), 1 - images.flatten(1).mean(1)], 1)
