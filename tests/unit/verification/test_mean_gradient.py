"""How many images are passed through a suspect at once."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from gradsigns_lightning import WatermarkKey, verify
from gradsigns_lightning.core.torch_state.memory import saved_bytes
from gradsigns_lightning.verification import mean_gradient

KEY = WatermarkKey.generate("A", 16, input_shape=(1, 6, 6), target_class=1, n_carriers=30, secret=bytes(32))
IMAGES = torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(2))
pytestmark = pytest.mark.filterwarnings("ignore:Only", "ignore:The model classifies only")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize(("n_at_once", "sizes"), [(1000, [1, 60]), (25, [1, 25, 25, 10]), (0, [1] * 61)])
def test_no_pass_keeps_more_than_is_allowed(monkeypatch, n_at_once, sizes):
    model, calls, kept = network(), [], []
    monkeypatch.setattr(
        mean_gradient, "saved_bytes", lambda *arguments: kept.append(saved_bytes(*arguments)) or kept[-1]
    )
    whole = verify(model, KEY, IMAGES)
    per_image = mean_gradient._PEAK * kept[0] + mean_gradient._COPIES * 8 * IMAGES[0].numel()
    monkeypatch.setattr(mean_gradient, "_MOST_BYTES", n_at_once * per_image)
    pieces = verify(model, KEY, IMAGES, logits=lambda x: calls.append(len(x)) or model(x))
    assert calls == sizes
    assert (pieces.n_matches, pieces.recognised) == (whole.n_matches, whole.recognised)


PEAK = """
import re, torch
from pathlib import Path
from gradsigns_lightning import WatermarkKey, verify
from gradsigns_lightning.verification import mean_gradient
from gradsigns_lightning.models import ViT

def most():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

mean_gradient._MOST_BYTES = 1 << 29
model = ViT((1, 32, 32), 2, patch_size=1, dim=32, depth=1, heads=8).eval()
key = WatermarkKey.generate("A", 64, input_shape=(1, 32, 32), target_class=0)
verify(model, key, torch.rand(1, 1, 32, 32))
before = most()
verify(model, key, torch.rand(16, 1, 32, 32))
print((most() - before) / mean_gradient._MOST_BYTES)
"""


def test_a_pass_takes_no_more_memory_than_is_allowed():
    """Attention has the highest peak of memory relative to its saved tensors."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK], capture_output=True, text=True, check=True, timeout=200
    )
    assert 0.2 < float(done.stdout) < 1.2


def test_a_model_of_whole_batches_is_read_in_whole_batches():
    model = network()

    def logits(x):
        if len(x) != 60:
            raise RuntimeError("exported for 60 images")
        return model(x)

    assert verify(model, KEY, IMAGES, logits=logits) == verify(model, KEY, IMAGES, batch_size=60)
