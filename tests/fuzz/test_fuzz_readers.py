"""A few seconds of coverage-guided fuzzing of everything that comes from others; minutes by hand, see fuzz_readers.py."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris")
SECONDS = os.environ.get("GRADSIGNS_FUZZ_SECONDS", "3")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["key", "bundle", "commitment", "journal", "server"])
def test_no_input_gives_more_than_a_clear_error(target, tmp_path):
    # A process starts with the peak memory of the one that started it.
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + 2048
    command = [sys.executable, str(Path(__file__).parent / "fuzz_readers.py"), target, "-timeout=20", "-seed=1", "-max_len=20000"]
    options = [f"-max_total_time={SECONDS}", f"-rss_limit_mb={limit}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done " in done.stderr  # libFuzzer's count of runs
