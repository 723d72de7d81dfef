"""What unit and integration tests share: networks that show a signature, and a local time-stamp authority made with openssl."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

_CONFIG = """
[tsa]
default_tsa = local
[local]
serial = serial
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256
[stamping]
keyUsage = critical,digitalSignature
extendedKeyUsage = critical,timeStamping
"""


@pytest.fixture(autouse=True)
def _threads_kept():
    """More threads than asked for make two processes on two cores wait for each other."""
    n_threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == n_threads


class Authority:
    """Signs time-stamp requests; its files lie in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "config").write_text(_CONFIG)
        (folder / "serial").write_text("01\n")
        self._openssl("genrsa -out root.key 2048")
        self._openssl("req -x509 -new -key root.key -out root.pem -subj /CN=Root -days 30")
        self._openssl("req -new -newkey rsa:2048 -nodes -keyout stamping.key -out stamping.csr -subj /CN=Stamping")
        sign = "x509 -req -in stamping.csr -CA root.pem -CAkey root.key -CAcreateserial -out stamping.pem -days 30"
        self._openssl(f"{sign} -extfile config -extensions stamping")

    @property
    def certificates(self) -> Path:
        """The root certificate, PEM."""
        return self.folder / "root.pem"

    def stamp(self, request: bytes) -> bytes:
        """Return the reply to a request."""
        (self.folder / "request.tsq").write_bytes(request)
        self._openssl("ts -reply -config config -queryfile request.tsq -signer stamping.pem -inkey stamping.key -out reply.tsr")
        return (self.folder / "reply.tsr").read_bytes()

    def verify(self, data: Path, reply: Path) -> bool:
        """Tell whether openssl itself accepts a reply for a file."""
        command = f"ts -verify -data {data} -in {reply} -CAfile root.pem"
        return subprocess.run(["openssl", *command.split()], cwd=self.folder, capture_output=True).returncode == 0

    def _openssl(self, command: str) -> None:
        subprocess.run(["openssl", *command.split()], cwd=self.folder, check=True, capture_output=True)


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    """A time-stamp authority of this test run."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def other_authority(tmp_path_factory, authority):
    """Another one, which nobody trusts."""
    return Authority(tmp_path_factory.mktemp("other"))


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
