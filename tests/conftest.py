"""What unit and integration tests share: networks that show a signature, and a local time-stamp authority."""

import math
import shutil
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from torch import nn

_CONFIG = """
[tsa]
default_tsa = local
[local]
serial = serial
signer_digest = {signer_digest}
ess_cert_id_alg = {ess_digest}
default_policy = 1.2.3.4.1
digests = sha1, sha256, sha384, sha512
"""


_SLOW = {Path(__file__).parent / folder for folder in ("integration", "fuzz")}


def pytest_collection_modifyitems(items):
    for item in items:
        if not _SLOW.isdisjoint(item.path.parents):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _threads_kept():
    """More threads than asked for make two processes on two cores wait for each other."""
    n_threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == n_threads


class Authority:
    """Signs time-stamp requests with openssl; its files lie in ``folder``, certificates as ``NAME.pem``.

    ``names`` are the certificates from the root to the one that stamps. ``valid`` says from when to when, in
    seconds from now, the last one is valid; ``sha1`` names those that are signed with SHA-1, and ``bits``
    says how long some keys are.
    """

    def __init__(
        self,
        folder: Path,
        *,
        names=("root", "stamping"),
        signer_digest="sha256",
        ess_digest="sha256",
        valid=(-86400, 30 * 86400),
        sha1=(),
        bits=None,
    ) -> None:
        self.folder, self.names = folder, names
        folder.mkdir(exist_ok=True)
        (folder / "config").write_text(_CONFIG.format(signer_digest=signer_digest, ess_digest=ess_digest))
        (folder / "serial").write_text("01\n")
        issuer = None
        for name in names:
            key = generate_private_key(65537, (bits or {}).get(name, 2048))
            last = name == names[-1]
            span = valid if last else (-2 * 86400, 60 * 86400)
            certificate = _certificate(name, key, issuer or (name, key), span, stamps=last)
            (folder / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
            (folder / f"{name}.key").write_bytes(
                key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            )
            if name in sha1:  # openssl still does it
                by = f"-CA {issuer[0]}.pem -CAkey {issuer[0]}.key" if issuer else f"-signkey {name}.key"
                self._openssl(
                    f"x509 -x509toreq -in {name}.pem -signkey {name}.key -copy_extensions copyall -out "
                    f"{name}.csr"
                )
                self._openssl(
                    f"x509 -req -in {name}.csr {by} -sha1 -copy_extensions copyall -set_serial 7 -out "
                    f"{name}.new"
                )
                (folder / f"{name}.new").replace(folder / f"{name}.pem")
            issuer = (name, key)

    @property
    def certificates(self) -> Path:
        """The root certificate, PEM."""
        return self.folder / f"{self.names[0]}.pem"

    def pem(self, *names) -> bytes:
        """Certificates one after the other."""
        return b"".join((self.folder / f"{name}.pem").read_bytes() for name in names)

    def stamp(self, request: bytes, *, beside=()) -> bytes:
        """Return the reply to a request; ``beside`` names the certificates after the signer's in it."""
        (self.folder / "request.tsq").write_bytes(request)
        (self.folder / "beside.pem").write_bytes(self.pem(*beside))
        signer = f"-signer {self.names[-1]}.pem -inkey {self.names[-1]}.key" + (
            " -chain beside.pem" if beside else ""
        )
        self._openssl(f"ts -reply -config config -queryfile request.tsq {signer} -out reply.tsr")
        return (self.folder / "reply.tsr").read_bytes()

    def verify(self, data: Path, reply: Path) -> bool:
        """Tell whether openssl itself accepts a reply for a file."""
        command = f"ts -verify -data {data} -in {reply} -CAfile {self.certificates.name}"
        return (
            subprocess.run(["openssl", *command.split()], cwd=self.folder, capture_output=True).returncode
            == 0
        )

    def _openssl(self, command: str) -> None:
        subprocess.run(["openssl", *command.split()], cwd=self.folder, check=True, capture_output=True)


def _certificate(name, key, issuer, span, *, stamps):
    """A certificate by ``issuer`` (name and key), an authority's or, if it ``stamps``, for stamps only."""
    now = datetime.now(timezone.utc)
    subject, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer[0]))
    usage = dict.fromkeys(
        ("key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"), False
    )
    usage |= {
        "digital_signature": stamps,
        "content_commitment": False,
        "key_cert_sign": not stamps,
        "crl_sign": not stamps,
    }
    builder = x509.CertificateBuilder(by, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now + timedelta(seconds=span[0])).not_valid_after(
        now + timedelta(seconds=span[1])
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=not stamps, path_length=None), critical=True)
    builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
    if stamps:
        builder = builder.add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING]), critical=True
        )
    return builder.sign(issuer[1], SHA256())


@pytest.fixture(scope="session")
def make_authority(tmp_path_factory):
    """Makes time-stamp authorities of this test run."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    return lambda **options: Authority(tmp_path_factory.mktemp("authority"), **options)


@pytest.fixture(scope="session")
def authority(make_authority):
    """A time-stamp authority of this test run."""
    return make_authority()


@pytest.fixture(scope="session")
def other_authority(make_authority):
    """Another one, which nobody trusts."""
    return make_authority()


class Planted(nn.Module):
    """Three logits, the last of class T; an image's gradient is the key's pattern plus noise of its own."""

    def __init__(self, key, noise=0.5, scale=6.0):
        super().__init__()
        signs = 2 * key.signature.float() - 1
        size = math.prod(key.input_shape)
        pattern = torch.zeros(size)
        pattern[key.carriers] = signs @ key.projection.float()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("pattern", scale * pattern / pattern.norm())
        self.register_buffer(
            "curvature", noise * scale * torch.randn(size, size, generator=generator) / size**0.5
        )

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
