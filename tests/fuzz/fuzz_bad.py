"""Readers that do what is forbidden, for the fuzzer's own test."""

import contextlib
import importlib
import pickle
import socket
import subprocess
from pathlib import Path

from fuzz_base import FOLDER, Reader


def at(act):
    """Return a function that makes a reader which does ``act`` at one input."""
    return lambda: Reader(lambda data: act() if data == b"bad" else None, [b"good"])


def swallow():
    with contextlib.suppress(Exception):
        Path("/etc/hostname").read_bytes()


def fail(error):
    raise error


ACTS = {
    "bad-open": lambda: Path("/etc/hostname").read_bytes(),
    "bad-swallow": swallow,
    "bad-write": lambda: (FOLDER / "x").write_text("x"),
    "bad-process": lambda: subprocess.run(["true"]),
    "bad-socket": lambda: socket.create_connection(("127.0.0.1", 9)),
    "bad-import": lambda: importlib.import_module("wave"),
    "bad-pickle": lambda: pickle.loads(b"cbuiltins\nlist\n."),
    "bad-exec": lambda: exec("1"),
    "bad-error": lambda: fail(KeyError("x")),
    "bad-message": lambda: fail(ValueError()),
    "bad-memory": lambda: b"x" * (3 << 29),
    "bad-end": lambda: all(True for _ in iter(int, 1)),
}
BAD = {name: at(act) for name, act in ACTS.items()}
