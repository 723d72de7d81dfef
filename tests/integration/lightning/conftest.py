"""Environment of the Lightning tests."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

# The shared task must be importable by name in spawned processes too; they inherit the path.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _environment_restored(monkeypatch, tmp_path):
    """Lightning and W&B write to the environment, to signal handlers and to the working directory."""
    before = dict(os.environ)
    handler = signal.getsignal(signal.SIGINT)
    dtype = torch.get_default_dtype()
    monkeypatch.chdir(tmp_path)
    yield
    signal.signal(signal.SIGINT, handler)
    assert torch.get_default_dtype() is dtype
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def seeded():
    torch.manual_seed(0)
