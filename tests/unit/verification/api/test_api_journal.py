"""A journal loses no response: crashes, power cuts, full disks, second processes and foreign files."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gradsigns_lightning import WatermarkKey, verify_api
from gradsigns_lightning.core.utils import lines
from gradsigns_lightning.verification.api import queries
from gradsigns_lightning.verification.api.queries import Journal, Transcript, read_journal

READING = {"commitment": "ab" * 32, "images": "cd" * 32, "alpha": 1e-9}
ANSWERS = [np.array([[0.25, np.nan], [0.5, 0.5]]), np.array([[0.125, 0.875]]), np.array([[1.0, 0.0]])]
WRITER = f"""
import itertools, sys
import numpy as np
from gradsigns_lightning.verification.api.queries import Journal
journal = Journal(sys.argv[1], {READING!r})
while journal.recorded("0" * 64) is not None:
    pass
for i in itertools.count():
    journal.prepare()
    if len(sys.argv) == 2:
        journal.record("0" * 64, np.random.default_rng(i).random((8, 500)))
    print(i, flush=True)
    if len(sys.argv) > 2:
        sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


def write(path, answers=ANSWERS):
    with Journal(path, READING) as journal:
        for i, answer in enumerate(answers):
            journal.prepare()
            journal.record(f"{i:064}", answer)


def n_recorded(path):
    return len(read_journal(path)) - 1


def writer(path, *words):
    command = [sys.executable, "-c", WRITER, str(path), *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# --- one writer at a time


def test_answers_read_back(path):
    write(path)
    with Journal(path, READING) as journal:
        for i, answer in enumerate(ANSWERS):
            assert np.array_equal(journal.recorded(f"{i:064}"), answer, equal_nan=True)
        assert journal.recorded("0" * 64) is None


def test_a_second_process_is_refused_and_let_in_when_the_first_was_killed(path):
    with writer(path, "hold") as first:
        assert first.stdout.readline() == "0\n"
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"`journal` must .* got '.*': another process is writing to it"):
            Journal(path, READING)
        assert path.read_bytes() == before
        first.kill()
    write(path)
    assert n_recorded(path) == 3


def test_another_name_of_the_same_file_is_refused_too(path):
    path.with_name("link").symlink_to(path)
    with Journal(path, READING), pytest.raises(ValueError, match="another process"):
        Journal(path.with_name("link"), READING)


def test_a_reading_that_ends_or_fails_lets_go(path):
    key = WatermarkKey.generate(
        "A", 8, input_shape=(1, 4, 4), target_class=0, n_carriers=16, secret=bytes(32)
    )
    images, calls = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)), []

    def predict(x):
        calls.append(len(x))
        if len(calls) == 3:
            raise ConnectionError("gone")
        return torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], 1)

    with pytest.raises(ConnectionError):
        verify_api(predict, key, images, max_queries=12, batch_size=2, journal=path)
    assert n_recorded(path) == 2
    verify_api(predict, key, images, max_queries=12, batch_size=2, journal=path)
    assert len(calls) == n_recorded(path) + 1  # nothing twice but what failed


def test_a_journal_is_let_go_of_when_it_is_refused(path):
    write(path)
    for _ in range(2):
        with pytest.raises(ValueError, match="`journal` must be new or of the same reading"):
            Journal(path, {**READING, "alpha": 0.5})
    write(path, [])


# --- crashes


def test_a_process_killed_while_it_writes_loses_nothing(path):
    n_acknowledged = 0
    for delay in (0.0, 0.03):
        with writer(path) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            n_acknowledged += 1 + len(process.stdout.read().splitlines())
        assert n_recorded(path) >= n_acknowledged
        n_acknowledged = n_recorded(path)
    write(path)
    assert n_recorded(path) == n_acknowledged + 3
    assert not path.read_bytes().endswith(b"\0")


@pytest.mark.parametrize("after", [b"", b"\0" * 5000], ids=["", "holes after it"])
def test_a_line_cut_off_anywhere_is_dropped_and_the_others_kept(path, after):
    write(path, ANSWERS[:2])
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut] + after)
        n_left = max(0, whole[:cut].count(b"\n") - 1)
        with Journal(path, READING) as journal:
            assert journal.n_left == n_left
            journal.record("9" * 64, ANSWERS[2])
        assert path.read_bytes()[: path.read_bytes().rindex(b'{"images"')] == (
            whole[:cut][: whole[:cut].rfind(b"\n") + 1] or whole[: whole.index(b"\n") + 1]
        )
        assert read_journal(path)[-1] == {"images": "9" * 64, "answer": [[1.0, 0.0]]}


@pytest.mark.parametrize("after", [b"", b"\0" * 5000], ids=["", "holes after it"])
def test_a_hole_in_the_last_line_is_a_line_cut_off(path, after):
    write(path)
    whole = path.read_bytes()
    start = whole.rindex(b"{")
    for first in range(start, len(whole) - 1, 7):
        path.write_bytes(whole[:first] + b"\0" * (len(whole) - 1 - first) + b"\n" + after)
        assert n_recorded(path) == 2
    path.write_bytes(whole[:start] + b"\0" * 20 + whole[start + 20 :])
    write(path, [ANSWERS[2]])
    assert n_recorded(path) == 3


def test_reading_touches_nothing_when_all_is_recorded(path):
    write(path)
    torn = path.read_bytes() + b'{"images'
    path.write_bytes(torn)
    with Journal(path, READING) as journal:
        assert journal.n_left == 3
    assert path.read_bytes() == torn


def test_a_stale_temporary_file_of_an_earlier_version_is_left_alone(path):
    write(path)
    stale = path.with_name(path.name + ".new")
    stale.write_text("half")
    write(path, ANSWERS[:1])
    assert (n_recorded(path), stale.read_text()) == (4, "half")


# --- disks without room


def failing(error, *, after=0):
    """Return an ``os.write`` of a disk that fills up after some bytes of a line."""
    original, left = os.write, [after]

    def write(handle, data):
        if not left[0]:
            raise OSError(error, os.strerror(error))
        n = original(handle, data[: left[0]])
        left[0] -= n
        return n

    return write


@pytest.mark.parametrize("after", [0, 1, 60])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_an_answer_that_cannot_be_written_is_undone(path, monkeypatch, after, error):
    write(path)
    before = path.read_bytes()
    with Journal(path, READING) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", failing(error, after=after))
            message = (
                rf"`journal`: '.*' cannot be written to: {os.strerror(error)}; the answers to 3 calls are "
                rf"kept; the same command"
            )
            with pytest.raises(ValueError, match=message):
                journal.record("3" * 64, ANSWERS[0])
        assert path.read_bytes() == before
        journal.record("3" * 64, ANSWERS[0])
    assert n_recorded(path) == 4


def test_an_answer_that_does_not_reach_the_disk_is_undone(path, monkeypatch):
    write(path)
    before = path.read_bytes()

    def fsync(handle):
        raise OSError(errno.EIO, "Input/output error")

    with Journal(path, READING) as journal:
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(ValueError, match="3 calls are kept"):
            journal.record("3" * 64, ANSWERS[0])
    assert path.read_bytes() == before


def query_until_it_fails(path):
    """Query with a journal; return the number of calls, and the error."""
    key = WatermarkKey.generate(
        "A", 8, input_shape=(1, 4, 4), target_class=0, n_carriers=16, secret=bytes(32)
    )
    images, calls = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)), []

    def predict(x):
        calls.append(len(x))
        return torch.rand((len(x), 1000), generator=torch.Generator().manual_seed(len(calls))).double()

    with pytest.raises(ValueError, match=r"`journal`: .*; the answers to") as caught:
        verify_api(
            predict, key, images, max_queries=400, batch_size=20, alpha=1e-200, estimator="rows", journal=path
        )
    return len(calls), str(caught.value)


def test_a_full_disk_is_noticed_before_the_next_question(path, monkeypatch):
    original, calls = os.posix_fallocate, []

    def fallocate(handle, start, length):
        calls.append(length)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(handle, start, length)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    n_calls, message = query_until_it_fails(path)
    assert n_calls == n_recorded(path) > 0
    assert f"No space left on device; the answers to {n_calls} calls are kept" in message


def test_a_limit_of_file_size_is_noticed_before_the_next_question(path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, before[1]))
    try:
        n_calls, message = query_until_it_fails(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert n_calls == n_recorded(path) > 0
    assert "File too large" in message


def test_a_small_disk_keeps_every_answer_that_was_asked_for(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    try:
        n_calls, message = query_until_it_fails(disk / "answers.jsonl")
        assert n_calls == n_recorded(disk / "answers.jsonl") > 0
        assert "No space left on device" in message
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("how", ["missing", errno.EOPNOTSUPP, errno.EINVAL])
def test_without_reservation_a_journal_works_too(path, monkeypatch, how):
    if how == "missing":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(how, "no")))
    write(path)
    assert n_recorded(path) == 3


def test_a_journal_does_not_outgrow_what_is_read(path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_BYTES", 3 << 20)
    n_calls, message = query_until_it_fails(path)
    assert n_calls == n_recorded(path) > 0
    assert "larger than 3145728 bytes" in message


def test_a_journal_does_not_get_more_lines_than_are_read(path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINES", 6)
    n_calls, message = query_until_it_fails(path)
    assert n_calls == n_recorded(path) == 5
    assert "more than 6 lines" in message


# --- files of others


@pytest.mark.parametrize(
    "content",
    [
        b"notes of my own",
        b"notes\nof my own\n",
        b"\x89PNG\r\n\x1a\n\0\0\0",
        b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
        b"{}\n{}\n",
        b"\0notes",
        b"PK\x03\x04\0\0of my own\n",
        json.dumps({"format": "gradsigns-journal/1", **READING}).encode()[:20] + b"\0" * 9 + b"of my own",
        json.dumps({"format": "gradsigns-journal/1", **READING}).encode() + b"\0" * 9 + b"of my own",
        json.dumps({"format": "gradsigns-journal/1", **READING, "alpha": 1e-3}).encode()[:-3],
    ],
)
def test_other_files_are_refused_and_stay(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="`journal`"):
        Journal(path, READING)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "damage", [lambda line: b"\0" * len(line), lambda line: b"x" + line, lambda line: line[:-9]]
)
@pytest.mark.parametrize("which", [0, 2])
def test_a_line_damaged_further_up_is_an_error_and_the_file_stays(path, damage, which):
    write(path)
    content = path.read_bytes().splitlines()
    content[which] = damage(content[which])
    path.write_bytes(b"\n".join(content) + b"\n")
    before = path.read_bytes()
    for read in (read_journal, lambda path: Journal(path, READING)):
        with pytest.raises(ValueError, match="`journal` must name a journal"):
            read(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "record", [{}, [], 7, {"images": "0" * 64}, {"images": "0" * 64, "answer": {"a": 1}}, None]
)
def test_records_that_do_not_fit_are_an_error(path, record):
    write(path, [])
    with path.open("ab") as file:
        file.write(json.dumps(record).encode() + b"\n")
    with Journal(path, READING) as journal, pytest.raises(ValueError, match="does not fit this reading"):
        journal.recorded("0" * 64)


@pytest.mark.parametrize("name", [".", "nowhere/a", "/dev/zero", "a\0b", "no file"])
def test_what_is_no_file_is_no_journal(tmp_path, name):
    with pytest.raises(ValueError, match="`journal` must name a journal"):
        read_journal(tmp_path / name)
    if name != "no file":
        with pytest.raises(ValueError, match="`journal` must name a file in a writable folder"):
            Journal(tmp_path / name, READING)
    assert not (tmp_path / "nowhere").exists()


def test_files_too_large_are_not_read(path, monkeypatch):
    write(path)
    with monkeypatch.context() as patch:
        patch.setattr(lines, "MAX_BYTES", path.stat().st_size - 1)
        with pytest.raises(ValueError, match=r"`journal` .* it has more than"):
            read_journal(path)
    with monkeypatch.context() as patch:
        patch.setattr(lines, "MAX_LINES", 3)
        with pytest.raises(ValueError, match=r"`journal` .* it has more than 3 lines"):
            read_journal(path)
    monkeypatch.setattr(queries, "_MAX_VALUES", 10)
    with pytest.raises(ValueError, match="`journal` must hold at most 10 values"):
        read_journal(path)


@pytest.mark.parametrize("content", [b" \n", b"1\n", b"\n"])
def test_lines_are_counted_before_they_are_taken_apart(path, content, monkeypatch):
    monkeypatch.setattr(lines.io, "BytesIO", lambda _: pytest.fail("millions of lines were made"))
    path.write_bytes(content * (4 << 20))
    for read in (read_journal, lambda path: Journal(path, READING)):
        with pytest.raises(ValueError, match="it has more than 1048576 lines"):
            read(path)


@pytest.mark.parametrize("line", [b"1\n2\n3\n4\n5\n6\n7", b'{"a":1}', b"[[[]]]", b'["ab","cd"]'])
def test_the_values_of_all_lines_are_counted(path, line, monkeypatch):
    path.write_bytes((line + b"\n") * 20)
    monkeypatch.setattr(queries, "_MAX_VALUES", 120)
    with pytest.raises(ValueError, match="`journal` must hold at most 120 values"):
        read_journal(path)


def test_many_recorded_answers_are_gone_through_in_linear_time():
    n = 1 << 18
    transcript = Transcript(
        [{"format": "gradsigns-journal/1"}, *[{"images": "0", "answer": []}] * n], {}, name="a"
    )
    start = time.process_time()
    for left in range(n, 0, -1):
        assert transcript.n_left == left
        assert transcript.recorded("0") == []
    assert time.process_time() - start < 5  # half a minute, if each one moves all that follow
    assert transcript.recorded("0") is None


def test_a_link_to_nowhere_makes_no_file_elsewhere(path, tmp_path):
    path.symlink_to(tmp_path / "elsewhere.txt")
    with pytest.raises(ValueError, match=r"`journal` must .* it is a symbolic link to nowhere"):
        Journal(path, READING)
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_that_is_a_link_empties_no_file_elsewhere(path, tmp_path):
    (tmp_path / "elsewhere.txt").write_text("mine")
    (tmp_path / f"{path.name}.lock").symlink_to(tmp_path / "elsewhere.txt")
    with pytest.raises(
        ValueError,
        match=r"`journal` must .* its lock 'answers\.jsonl\.lock' is a symbolic "
        r"link",
    ):
        Journal(path, READING)
    assert (tmp_path / "elsewhere.txt").read_text() == "mine"
    assert not path.exists()


def test_lines_nested_deeply_are_refused(path):
    path.write_bytes(b'{"images": ' + b"[" * 200_000 + b"\n")
    with pytest.raises(ValueError, match="`journal` must name a journal"):
        read_journal(path)


def test_constants_of_other_writers_are_read(path):
    """NaN and Infinity, as Python's json writes them, and as text, as this one does."""
    write(path, [])
    with path.open("a") as file:
        file.write('{"images": "%s", "answer": [[NaN, 1.0], ["-inf", Infinity]]}\n' % ("0" * 64))
    with Journal(path, READING) as journal:
        expected = [[np.nan, 1.0], [-np.inf, np.inf]]
        assert np.array_equal(journal.recorded("0" * 64), expected, equal_nan=True)
