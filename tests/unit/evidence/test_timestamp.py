"""Time-stamps of authorities made by the tests, checked by openssl as well."""

import base64
import itertools
import re
import shlex
import subprocess
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsigns_lightning.evidence import Statement, check_timestamp, timestamp, timestamp_request

pytest.importorskip("rfc3161_client")
STATEMENT = Statement(("ab" * 32,), "cd" * 32)
REFUSED = "`timestamp` must be a trusted authority's reply"
FOUR = ("root", "middle", "lower", "stamping")


def query(folder, digest, data=None):
    """A request with a different digest from ours, made by openssl."""
    (folder / "data").write_bytes(data or STATEMENT.to_bytes())
    subprocess.run(
        ["openssl", "ts", "-query", "-data", "data", f"-{digest}", "-cert", "-out", "q"],
        cwd=folder,
        check=True,
    )
    return (folder / "q").read_bytes()


@pytest.fixture(scope="module")
def long_chain(make_authority):
    return make_authority(names=FOUR)


@pytest.mark.parametrize(
    "beside", [p for n in range(4) for p in itertools.permutations(("root", "middle", "lower"), n)]
)
def test_certificates_come_in_any_order(long_chain, beside):
    reply = long_chain.stamp(timestamp_request(STATEMENT), beside=beside)
    stamped = check_timestamp(reply, STATEMENT, long_chain.pem("middle", "root", "lower"))
    assert abs(stamped - datetime.now(timezone.utc)) < timedelta(minutes=5)
    if {"middle", "lower"} <= {*beside}:
        check_timestamp(reply, STATEMENT, long_chain.pem("root"))
    else:
        with pytest.raises(ValueError, match=REFUSED):
            check_timestamp(reply, STATEMENT, long_chain.pem("root"))


def test_a_certificate_that_is_listed_twice_is_taken_once(authority):
    reply = authority.stamp(timestamp_request(STATEMENT))
    assert check_timestamp(reply, STATEMENT, authority.pem("root", "stamping", "root"))


@pytest.mark.parametrize("digest", ["sha256", "sha384", "sha512"])
def test_imprints_of_sha2_are_taken(authority, tmp_path, digest):
    assert check_timestamp(authority.stamp(query(tmp_path, digest)), STATEMENT, authority.pem("root"))


def test_imprints_of_sha1_are_refused(authority, tmp_path):
    with pytest.raises(ValueError, match=f"{REFUSED}.*Unsupported hash algorithm"):
        check_timestamp(authority.stamp(query(tmp_path, "sha1")), STATEMENT, authority.pem("root"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"signer_digest": "sha1"},
            "must be signed with SHA-256, SHA-384, SHA-512, not with the digest algorithm 1.3.14.3.2.26",
        ),
        ({"signer_digest": "sha224"}, "must be signed with SHA-256, SHA-384, SHA-512, not"),
        ({"sha1": ("stamping",)}, "certificate 'CN=stamping' is signed with SHA1"),
        ({"sha1": ("middle",)}, "certificate 'CN=middle' is signed with SHA1"),
        ({"bits": {"stamping": 1024}}, "certificate 'CN=stamping' has a key of 1024 bits, fewer than 2048"),
        ({"bits": {"root": 1024}}, "certificate 'CN=root' has a key of 1024 bits, fewer than 2048"),
    ],
)
def test_what_rests_on_sha1_or_a_short_key_is_refused(make_authority, options, reason):
    authority = make_authority(names=("root", "middle", "stamping"), **options)
    reply = authority.stamp(timestamp_request(STATEMENT), beside=("middle",))
    with pytest.raises(ValueError, match=f"{REFUSED}.*{reason}"):
        check_timestamp(reply, STATEMENT, authority.pem("root", "middle"))


@pytest.mark.parametrize(
    "options", [{"sha1": ("root",)}, {"ess_digest": "sha1"}, {"signer_digest": "sha512"}]
)
def test_sha1_in_a_trusted_roots_own_signature_or_a_pointer_is_no_weakness(make_authority, options):
    authority = make_authority(**options)
    reply = authority.stamp(timestamp_request(STATEMENT), beside=("root",))
    assert check_timestamp(reply, STATEMENT, authority.pem("root"))


def test_a_weak_certificate_beside_a_strong_chain_does_no_harm(make_authority, authority):
    weak = make_authority(names=("weak", "weaker"), sha1=("weaker",))
    (authority.folder / "weaker.pem").write_bytes(weak.pem("weaker"))
    reply = authority.stamp(timestamp_request(STATEMENT), beside=("weaker",))
    assert check_timestamp(reply, STATEMENT, authority.pem("root"))


def test_two_certificates_of_the_signers_name_and_number_are_refused(authority, monkeypatch):
    """The library checks the permissions of one of them, and the signature with the other."""
    from cryptography import x509

    monkeypatch.setattr(x509, "random_serial_number", lambda: signer.serial_number)
    signer = x509.load_pem_x509_certificate(authority.pem("stamping"))
    twin = type(authority)(authority.folder / "twin", names=("root", "stamping"))
    (authority.folder / "twin.pem").write_bytes(twin.pem("stamping"))
    reply = authority.stamp(timestamp_request(STATEMENT), beside=("twin",))
    with pytest.raises(ValueError, match=REFUSED):
        check_timestamp(reply, STATEMENT, authority.pem("root"))


def test_a_certificate_may_have_expired_since_and_openssl_agrees(make_authority, tmp_path):
    authority = make_authority(valid=(-60, 2))
    made = time.monotonic()
    reply = authority.stamp(timestamp_request(STATEMENT))
    time.sleep(max(0, 3.5 - (time.monotonic() - made)))
    stamped = check_timestamp(reply, STATEMENT, authority.pem("root"))
    (tmp_path / "a.json").write_bytes(STATEMENT.to_bytes())
    (tmp_path / "a.tsr").write_bytes(reply)
    files = f"-data a.json -in a.tsr -CAfile {authority.certificates}"
    codes = [
        subprocess.run(
            shlex.split(f"openssl ts -verify {options} {files}"), cwd=tmp_path, capture_output=True
        ).returncode
        for options in ("", f"-attime {int(stamped.timestamp())}")
    ]
    assert codes == [1, 0]


def test_the_documented_line_checks_a_stamp(make_authority, tmp_path):
    document = Path(__file__).parents[3] / "docs/evidence.md"
    (line,) = re.findall(r"^(openssl ts -verify [^#\n]+)", document.read_text(), re.MULTILINE)
    authority = make_authority()
    reply = authority.stamp(timestamp_request(STATEMENT))
    seconds = int(check_timestamp(reply, STATEMENT, authority.pem("root")).timestamp())
    contents = {"json": STATEMENT.to_bytes(), "tsr": reply}
    for suffix, data in contents.items():
        (tmp_path / f"acme.commitment.{suffix}").write_bytes(data)
    (tmp_path / "authority.pem").write_bytes(authority.pem("root"))

    def code():
        return subprocess.run(
            shlex.split(line.replace("SECONDS", str(seconds))), cwd=tmp_path, capture_output=True
        ).returncode

    assert code() == 0
    (tmp_path / "acme.commitment.json").write_bytes(STATEMENT.to_bytes() + b" ")
    assert code() == 1


@pytest.mark.parametrize("valid", [(3600, 7200), (-7200, -3600)])
def test_a_certificate_that_was_not_valid_then_is_refused(make_authority, valid):
    authority = make_authority(valid=valid)
    with pytest.raises(ValueError, match=f"{REFUSED}.*certificate verify error"):
        check_timestamp(authority.stamp(timestamp_request(STATEMENT)), STATEMENT, authority.pem("root"))


def test_a_stamp_of_the_future_is_refused(authority, monkeypatch):
    reply = authority.stamp(timestamp_request(STATEMENT))

    class Earlier(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - ago

    monkeypatch.setattr(timestamp, "datetime", Earlier)
    ago = timedelta(minutes=4)
    assert check_timestamp(reply, STATEMENT, authority.pem("root"))
    ago = timedelta(minutes=6)
    with pytest.raises(ValueError, match=f"{REFUSED}.*lies in the future"):
        check_timestamp(reply, STATEMENT, authority.pem("root"))


def test_replies_and_authorities_of_any_size_are_not_read(authority):
    reply = authority.stamp(timestamp_request(STATEMENT))
    with pytest.raises(ValueError, match=f"{REFUSED}.*more than 262144 bytes"):
        check_timestamp(reply + bytes(1 << 18), STATEMENT, authority.pem("root"))
    with pytest.raises(ValueError, match="`authority` must have at most 1048576 bytes"):
        check_timestamp(reply, STATEMENT, authority.pem("root") + bytes(1 << 20))


@pytest.fixture(scope="module")
def genuine(long_chain):
    return long_chain.stamp(timestamp_request(STATEMENT), beside=FOUR[:3]), long_chain.pem("root")


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_bytes_are_a_reply_or_a_value_error(genuine, data):
    reply, authority = genuine
    edits = st.tuples(st.integers(0, len(reply) - 1), st.integers(0, 4), st.binary(max_size=4))
    for at, n, new in data.draw(st.lists(edits, min_size=1, max_size=3)):
        reply = reply[:at] + new + reply[at + n :]
    try:
        check_timestamp(reply, STATEMENT, authority)
    except ValueError as error:
        assert str(error).startswith(REFUSED)  # noqa: PT017


@pytest.mark.parametrize(
    "reply", ["", "30", "30800000", "3084ffffffff", "3003020100" * 9, "30053003020100", "30053003020102"]
)
def test_short_replies_are_refused(authority, reply):
    with pytest.raises(ValueError, match=REFUSED):
        check_timestamp(bytes.fromhex(reply), STATEMENT, authority.pem("root"))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 1200))
def test_any_bytes_are_an_authority_or_a_value_error(genuine, junk, at):
    reply, pem = genuine
    try:
        check_timestamp(reply, STATEMENT, pem[:at] + junk + pem[at:])
    except ValueError as error:
        assert str(error).startswith(("`authority` must", REFUSED))  # noqa: PT017


def test_an_authority_of_an_unknown_version_is_a_value_error(genuine):
    """The library also raises other errors than ValueError for a certificate."""
    reply, pem = genuine
    der = base64.b64decode("".join(line for line in pem.decode().splitlines() if not line.startswith("-")))
    at = der.index(b"\xa0\x03\x02\x01\x02") + 4  # [0] INTEGER 2 says version 3
    changed = base64.b64encode(der[:at] + b"\x0f" + der[at + 1 :]).decode()
    with pytest.raises(ValueError, match="`authority` must be a PEM file"):
        check_timestamp(
            reply, STATEMENT, f"-----BEGIN CERTIFICATE-----\n{changed}\n-----END CERTIFICATE-----\n".encode()
        )
