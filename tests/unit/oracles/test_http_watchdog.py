"""Scripted servers that drip, flood and bomb: an exchange ends in time and leaves nothing behind."""

import gzip
import ipaddress
import json
import socket
import ssl
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from gradsigns_lightning.oracles import HttpOracle, MlflowProtocol, OracleError, http
from gradsigns_lightning.oracles.watchdog import Watchdog

IMAGES = torch.zeros(1, 1, 2, 2)
SCORES = [[0.25, 0.75]]
BODY = json.dumps({"predictions": SCORES}).encode()
OK = b"HTTP/1.1 200 OK\r\n"
GOOD = OK + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
TIMEOUT = 0.6
SLACK = 1.5  # a busy machine


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for the loopback address, with its key, PEM."""
    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")]),
    )
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1)
    )
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = builder.add_extension(address, critical=False).sign(key, SHA256())
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(
        made.public_bytes(Encoding.PEM) + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return path


@contextmanager
def serving(speak, *, certificate=None):
    """Serve requests with ``speak``; yields the server's URL and the first lines of its connections."""
    listener = socket.create_server(("127.0.0.1", 0))
    seen, threads, connections, over = [], [], [], threading.Event()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if certificate else None
    if context:
        context.load_cert_chain(certificate)

    def attend(connection):
        with suppress(OSError), connection:
            if context:
                connection = context.wrap_socket(connection, server_side=True)
            while head := read_request(connection):
                seen.append(head)
                speak(connection, over)

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection.dup())
            threads.append(threading.Thread(target=attend, args=(connection,)))
            threads[-1].start()

    threads.append(threading.Thread(target=accept))
    threads[0].start()
    try:
        yield f"http{'s' if certificate else ''}://127.0.0.1:{listener.getsockname()[1]}", seen
    finally:
        over.set()
        for open_one in (listener, *connections):
            with open_one, suppress(OSError):
                open_one.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(20)


def read_request(connection):
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte:
            return None
        head += byte
    length = [
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    ]
    left = length[0] if length else 0
    while left:
        left -= len(connection.recv(left))
    return head.split(b"\r\n")[0].decode()


def dripping(before, drop=b"x", after=b""):
    """Send something, then a byte every twentieth of a second for much longer than the time-out."""

    def speak(connection, over):
        connection.sendall(before)
        end = time.monotonic() + 10 * TIMEOUT
        while time.monotonic() < end and not over.is_set():
            connection.sendall(drop)
            time.sleep(0.05)
        connection.sendall(after)

    return speak


DRIPS = {
    "status line": dripping(b"HTTP/1.1 200 "),
    "header": dripping(OK + b"Server: "),
    "headers": dripping(OK, b"A: b\r\n"),
    "interim replies": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": dripping(OK + b"Content-Length: 1000\r\n\r\n", b" "),
    "body until the end": dripping(OK + b"Connection: close\r\n\r\n" + BODY, b" "),
    "length of a chunk": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "extension of a chunk": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n5;", b"a"),
    "chunks": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "trailer": dripping(
        OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n", b"T"
    ),
    "trailers": dripping(
        OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n", b"T: u\r\n"
    ),
    # a name without end
    "packed": dripping(OK + b"Content-Encoding: gzip\r\n\r\n" + b"\x1f\x8b\x08\x08\0\0\0\0\0\x03"),
}


def refusal(url, **options):
    """Return the message of an oracle that gives up, and the seconds until then."""
    start = time.monotonic()
    with pytest.raises(OracleError) as caught:
        HttpOracle(url, MlflowProtocol(), **{"timeout": TIMEOUT, "retries": 0, "pause": 0.0, **options})(
            IMAGES
        )
    return str(caught.value), time.monotonic() - start


def watchdogs():
    return [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


@pytest.fixture(autouse=True)
def nothing_left_over():
    yield
    assert watchdogs() == []


@pytest.fixture(params=["http", "https"])
def tls(request, monkeypatch, certificate):
    """The certificate, or None for a server without TLS."""
    if request.param == "http":
        return None
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    return certificate


@pytest.mark.parametrize("what", DRIPS)
def test_a_server_that_drips_is_left_in_time(what, tls):
    with serving(DRIPS[what], certificate=tls) as (url, _):
        message, seconds = refusal(url)
    assert "at last with a time-out" in message
    assert seconds < TIMEOUT + SLACK


@pytest.mark.parametrize("status", [b"302 Found\r\nLocation: /x", b"404 Not Found"])
def test_bodies_of_no_interest_are_not_waited_for(status):
    with serving(dripping(b"HTTP/1.1 " + status + b"\r\nContent-Length: 1000\r\n\r\n")) as (url, _):
        message, seconds = refusal(url, timeout=20.0)
    assert f"refused the request with status {status[:3].decode()}" in message
    assert seconds < 5 * TIMEOUT


def test_no_watchdog_is_left_over_at_any_time():
    for _ in range(300):
        with Watchdog(60.0):
            assert len(watchdogs()) == 1
        assert watchdogs() == []


def test_the_fixture_can_be_queried(tls):
    with serving(lambda connection, over: connection.sendall(GOOD), certificate=tls) as (url, _):
        assert HttpOracle(url, MlflowProtocol(), timeout=10.0)(IMAGES) == SCORES


@pytest.mark.parametrize("what", ["header", "body", "length of a chunk"])
def test_a_connection_that_is_kept_is_watched_again(what, tls):
    replies = [lambda connection, over: connection.sendall(GOOD), DRIPS[what]]
    with serving(lambda *arguments: replies.pop(0)(*arguments), certificate=tls) as (url, seen):
        oracle = HttpOracle(url, MlflowProtocol(), timeout=TIMEOUT, retries=0)
        oracle._timeout = 10.0  # the first exchange may take its time
        assert oracle(IMAGES) == SCORES
        oracle._timeout = TIMEOUT
        start = time.monotonic()
        with pytest.raises(OracleError, match="at last with a time-out"):
            oracle(IMAGES)
        assert time.monotonic() - start < TIMEOUT + SLACK
    assert len(seen) == 2


def test_a_connection_is_kept(tls):
    accepted = []

    def speak(connection, over):
        accepted.append(connection.getpeername())
        connection.sendall(GOOD)

    with serving(speak, certificate=tls) as (url, _):
        oracle = HttpOracle(url, MlflowProtocol(), timeout=10.0)
        assert [oracle(IMAGES) for _ in range(3)] == [SCORES] * 3
    assert len(set(accepted)) == 1


def test_after_a_time_out_the_next_attempt_succeeds(tls):
    replies = [DRIPS["body"], lambda connection, over: connection.sendall(GOOD)]
    with serving(lambda *arguments: replies.pop(0)(*arguments), certificate=tls) as (url, seen):
        oracle = HttpOracle(url, MlflowProtocol(), timeout=2.0, retries=1, pause=0.0)
        assert oracle(IMAGES) == SCORES
    assert len(seen) == 2


def test_all_attempts_together_take_as_long_as_is_said():
    with serving(DRIPS["header"]) as (url, seen):
        message, seconds = refusal(url, timeout=0.4, retries=2, pause=0.2)
    assert "failed 3 times, at last with a time-out" in message
    assert 3 * 0.4 + 0.2 * 3 <= seconds < 3 * 0.4 + 0.2 * 3 + SLACK
    assert len(seen) == 3


def test_a_handshake_that_drips_is_left_in_time(monkeypatch, certificate):
    listener = socket.create_server(("127.0.0.1", 0))

    def drip():
        connection, _ = listener.accept()
        with suppress(OSError), connection:
            # the beginning of a long ServerHello
            connection.sendall(b"\x16\x03\x03\x3f\xff\x02\x00\x3f\xfb\x03\x03")
            for _ in range(200):
                connection.sendall(b"\0")
                time.sleep(0.05)

    thread = threading.Thread(target=drip)
    thread.start()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with listener:
        message, seconds = refusal(f"https://127.0.0.1:{listener.getsockname()[1]}")
    thread.join(20)
    assert "at last with a time-out" in message
    assert seconds < TIMEOUT + SLACK


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("what", ["status line", "header", "headers"])
def test_a_proxy_that_drips_is_left_in_time(what, scheme, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(DRIPS[what]) as (url, seen):
        monkeypatch.setenv(f"{scheme}_proxy", url)
        message, seconds = refusal(f"{scheme}://a.invalid/")
    assert "at last with a time-out" in message
    assert seconds < TIMEOUT + SLACK
    assert seen[0].startswith("CONNECT a.invalid:443" if scheme == "https" else "POST http://a.invalid/")


def test_a_server_that_does_not_read_is_left_in_time():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        large = torch.zeros(1, 1, 1500, 1500)
        start = time.monotonic()
        with pytest.raises(OracleError, match="at last with a time-out"):
            HttpOracle(
                f"http://127.0.0.1:{listener.getsockname()[1]}", MlflowProtocol(), timeout=TIMEOUT, retries=0
            )(large)
        # writing so large a request takes its time, too
        assert time.monotonic() - start < TIMEOUT + SLACK + 3


# --- sizes


@pytest.fixture
def small(monkeypatch):
    """Lower the limits so that they are reached at once."""
    monkeypatch.setattr(http, "_LARGEST_REPLY", 1 << 20)
    monkeypatch.setattr(http, "_LARGEST_TRANSFER", 2 << 20)


def saying(data):
    def speak(connection, over):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)

    return speak


LONG = b"a" * (3 << 20)
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (OK + b"\r\n" + LONG, "larger than 64 MiB"),
        (CHUNKED + b"\r\n" + b"1;" + LONG, "larger than 64 MiB|a broken connection"),
        (CHUNKED + b"\r\n" + LONG, "larger than 64 MiB|a broken connection"),
        (CHUNKED + b"\r\n1\r\n \r\n0\r\n" + LONG, "larger than 64 MiB|a broken connection"),
        (OK + b"Server: " + LONG, "a broken connection"),
        (OK + b"A: b\r\n" * 101 + b"\r\n", "a broken connection"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 100_000, "larger than 64 MiB"),
        (
            b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Encoding: gzip\r\n\r\n"
            + gzip.compress(LONG, mtime=0),
            "status 302",
        ),
    ],
)
@pytest.mark.usefixtures("small")
def test_lines_and_bodies_without_end_are_refused(reply, message):
    with serving(saying(reply)) as (url, _), pytest.raises(OracleError, match=message):
        HttpOracle(url, MlflowProtocol(), timeout=20.0, retries=0)(IMAGES)


def answering(body, headers=b""):
    return OK + headers + b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body


def test_a_reply_of_many_small_values_is_refused_before_it_is_built():
    body = b'{"predictions": [[0.5, 0.5]], "x": [' + b"{}," * (1 << 21) + b"{}]}"
    with (
        serving(saying(answering(body))) as (url, _),
        pytest.raises(OracleError, match="must have at most 2097152 values"),
    ):
        HttpOracle(url, MlflowProtocol(), timeout=20.0, retries=0)(IMAGES)


def test_a_servers_cookies_are_not_kept():
    reply = answering(b'{"predictions": [[0.5, 0.5]]}', b"Set-Cookie: a=" + b"b" * 4000 + b"\r\n")
    with serving(saying(reply)) as (url, _):
        oracle = HttpOracle(url, MlflowProtocol(), timeout=20.0, retries=0)
        for _ in range(3):
            oracle(IMAGES[:1])
    assert len(oracle._session.cookies) == 0


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
@pytest.mark.parametrize("framing", [b"", b"Transfer-Encoding: chunked\r\n"])
def test_few_bytes_that_unpack_to_many_are_refused(pack, framing, monkeypatch):
    """Also in a single chunk: what is unpacked at once never exceeds the limit."""
    packed, unpacked = pack(bytes(40 << 20)), []
    original = zlib.decompressobj

    class Unpacker:
        def __init__(self, *arguments):
            self._inner = original(*arguments)

        def __getattr__(self, name):
            return getattr(self._inner, name)

        def decompress(self, *arguments):
            unpacked.append(self._inner.decompress(*arguments))
            return unpacked[-1]

    monkeypatch.setattr(zlib, "decompressobj", Unpacker)
    monkeypatch.setattr(http, "_LARGEST_REPLY", 1 << 20)
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(packed), packed) if framing else packed
    encoding = b"gzip" if pack is gzip.compress else b"deflate"
    with (
        serving(saying(OK + framing + b"Content-Encoding: " + encoding + b"\r\n\r\n" + body)) as (url, _),
        pytest.raises(OracleError, match="larger than"),
    ):
        HttpOracle(url, MlflowProtocol(), timeout=20.0, retries=0)(IMAGES)
    assert max(map(len, unpacked)) <= (1 << 20) + 1


@pytest.mark.parametrize(
    ("name", "pack"), [("gzip", gzip.compress), ("X-GZIP", gzip.compress), ("deflate", zlib.compress)]
)
def test_packed_replies_are_read(name, pack):
    head = OK + f"Content-Encoding: {name}\r\nContent-Length: {len(pack(BODY))}\r\n\r\n".encode()
    with serving(lambda connection, over: connection.sendall(head + pack(BODY))) as (url, _):
        assert HttpOracle(url, MlflowProtocol(), timeout=10.0)(IMAGES) == SCORES


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("br", BODY, "has a content encoding that was not asked for: 'br'"),
        ("gzip, gzip", gzip.compress(gzip.compress(BODY, mtime=0), mtime=0), "not asked for"),
        ("gzip", BODY, "cannot be decompressed"),
        ("gzip", gzip.compress(BODY, mtime=0)[:-12], "reply cannot be used"),
    ],
)
def test_other_packings_are_refused(name, body, message):
    reply = OK + f"Content-Encoding: {name}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with serving(saying(reply)) as (url, _), pytest.raises(OracleError, match=message):
        HttpOracle(url, MlflowProtocol(), timeout=10.0, retries=0)(IMAGES)
