"""What the tests of readers share."""

import math

import pytest
import torch
from torch import nn


class Planted(nn.Module):
    """Three logits, the last of class T; an image's gradient is the key's pattern plus noise of its own, as strong as given."""

    def __init__(self, key, noise=0.5, scale=6.0):
        super().__init__()
        signs = 2 * key.signature.float() - 1
        size = math.prod(key.input_shape)
        pattern = torch.zeros(size)
        pattern[key.carriers] = signs @ key.projection.float()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("pattern", scale * pattern / pattern.norm())
        self.register_buffer("curvature", noise * scale * torch.randn(size, size, generator=generator) / size**0.5)

    def forward(self, x):
        # Centred, so that images of both sides of the boundary are there.
        x = x.flatten(1) - 0.5
        own = ((x @ self.curvature) * x).sum(1) / x.norm(dim=1)
        sure = 0.5 - x @ self.pattern + own  # J rises along the pattern
        return torch.stack([torch.zeros_like(sure), -0.5 + 0 * sure, sure], 1)


@pytest.fixture(scope="session")
def planted():
    """The class of networks that show a key's signature by construction."""
    return Planted
