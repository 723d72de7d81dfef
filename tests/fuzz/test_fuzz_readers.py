"""A few seconds of coverage-guided fuzzing of everything that comes from others; minutes by hand, see fuzz_readers.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris")
SECONDS = os.environ.get("GRADSIGNS_FUZZ_SECONDS", "3")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["key", "bundle", "commitment", "journal", "server"])
def test_no_input_gives_more_than_a_clear_error(target, tmp_path):
    command = [sys.executable, str(Path(__file__).parent / "fuzz_readers.py"), target, "-timeout=20", "-seed=1", "-max_len=20000"]
    done = subprocess.run([*command, f"-max_total_time={SECONDS}"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done " in done.stderr  # libFuzzer's count of runs
