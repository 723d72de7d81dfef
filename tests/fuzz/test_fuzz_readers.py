"""Some seconds of coverage-guided fuzzing for each kind of foreign file; fuzz_readers.py runs for longer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris")
for package in ("onnx", "onnxruntime", "rfc3161_client", "h5py", "PIL", "requests"):
    pytest.importorskip(package)
SECONDS = os.environ.get("GRADSIGNS_FUZZ_SECONDS", "15")
ACTS = (
    "open",
    "swallow",
    "write",
    "process",
    "socket",
    "import",
    "pickle",
    "exec",
    "error",
    "message",
    "memory",
    "end",
)
BAD = [f"bad-{act}" for act in ACTS]
TARGETS = [
    "checkpoint",
    "key",
    "bundle",
    "commitment",
    "journal",
    "timestamp",
    "onnx",
    "image",
    "dataset",
    "server",
    "released",
]


def fuzz(folder, *words):
    command = [sys.executable, str(Path(__file__).parent / "fuzz_readers.py"), *words]
    environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", cwd=folder, env=environment
    )


@pytest.mark.timeout(60 + len(TARGETS) * (int(SECONDS) + 60))
def test_no_input_gives_more_than_a_clear_error(tmp_path):
    done = fuzz(tmp_path, *TARGETS, "-seed=1", f"-max_total_time={SECONDS}")
    inputs = {path.name: path.read_bytes()[:2000] for path in tmp_path.iterdir() if path.is_file()}
    assert done.returncode == 0, f"{done.stderr[-5000:]}\n{inputs}"
    assert done.stderr.count("\nDone ") == len(TARGETS)  # libFuzzer's count of runs


def test_the_fuzzer_ends_at_what_a_reader_must_not_do(tmp_path):
    (tmp_path / "input").write_bytes(b"bad")
    done = fuzz(tmp_path, *BAD, "-timeout=2", "input")
    assert done.stderr.splitlines()[-1] == f"failed: {', '.join(BAD)}"
    (tmp_path / "input").write_bytes(b"good")
    assert fuzz(tmp_path, *BAD, "input").returncode == 0
