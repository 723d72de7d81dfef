"""Files are written atomically, and only one of several writers makes a new one."""

import errno
import multiprocessing
import os
import stat
import threading

import pytest

from gradsigns_lightning.core.utils.files import atomic_write, read_file


def names(folder):
    return [path.name for path in folder.iterdir()]


def write(path, data=b"new", *, overwrite=False, **options):
    atomic_write(path, data, argument="out", overwrite=overwrite, **options)


def without_links(*_, **__):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.fixture(params=["hard links", "no hard links"])
def links(request, monkeypatch):
    if request.param == "no hard links":
        monkeypatch.setattr(os, "link", without_links)


def race(barrier, path, data, results):
    barrier.wait()
    try:
        write(path, data)
        results.put(data)
    except ValueError as error:
        results.put(str(error))


@pytest.mark.usefixtures("links")
@pytest.mark.parametrize("attempt", range(5))
def test_one_of_three_processes_makes_a_new_file(tmp_path, attempt):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    content = [bytes([i]) * (1 << 20) for i in range(3)]
    processes = [
        context.Process(target=race, args=(barrier, tmp_path / "a", data, results)) for data in content
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    (made,) = [result for result in found if isinstance(result, bytes)]
    refused = [result for result in found if isinstance(result, str)]
    assert refused == [f"`out` must not name an existing file, got '{tmp_path / 'a'}'."] * 2
    assert (tmp_path / "a").read_bytes() == made
    assert names(tmp_path) == ["a"]


def test_who_loses_the_race_does_not_replace_the_file(tmp_path, monkeypatch):
    """The file appears after the check and before the move."""
    original = os.fsync

    def fsync(handle):
        original(handle)
        (tmp_path / "a").write_bytes(b"first")

    monkeypatch.setattr(os, "fsync", fsync)
    for link in (os.link, without_links):
        monkeypatch.setattr(os, "link", link)
        with pytest.raises(ValueError, match="`out` must not name an existing file"):
            write(tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == b"first"
        assert names(tmp_path) == ["a"]
        (tmp_path / "a").unlink()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_reader_sees_a_whole_file_or_none(tmp_path, overwrite):
    path, sizes, done = tmp_path / "a", set(), threading.Event()

    def read():
        while not done.is_set():
            try:
                sizes.add(len(path.read_bytes()))
            except FileNotFoundError:
                sizes.add(None)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(30):
        write(path, b"x" * (1 << 20), overwrite=overwrite)
        if not overwrite:
            path.unlink()
    done.set()
    reader.join()
    assert sizes <= {None, 1 << 20}


@pytest.mark.usefixtures("links")
@pytest.mark.parametrize("mode", [0o600, 0o644])
@pytest.mark.parametrize("overwrite", [False, True])
def test_permissions_are_as_asked(tmp_path, mode, overwrite):
    write(tmp_path / "a", mode=mode, overwrite=overwrite)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_a_link_to_nowhere_is_not_replaced(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`out` must not name an existing file"):
        write(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_all_as_before(tmp_path, monkeypatch, overwrite):
    if overwrite:
        (tmp_path / "a").write_bytes(b"old")
    before = names(tmp_path)

    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path / "a", overwrite=overwrite)
    assert names(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interruption_leaves_all_as_before(tmp_path, monkeypatch, overwrite):
    if overwrite:
        (tmp_path / "a").write_bytes(b"old")
    before = names(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", without_links)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", overwrite=overwrite)
    assert names(tmp_path) == before


@pytest.mark.parametrize("name", ["nowhere/a", ".", "a" * 300])
@pytest.mark.parametrize("overwrite", [False, True])
def test_places_that_are_none_are_named(tmp_path, name, overwrite):
    with pytest.raises(ValueError, match="`out` must"):
        write(tmp_path / name, overwrite=overwrite)


def test_what_is_no_regular_file_is_neither_replaced_nor_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="`out` must name"):
        write(tmp_path / "pipe", overwrite=True)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="`in` must name a readable letter, got"):
            read_file(path, argument="in", kind="letter", max_bytes=10)
    (tmp_path / "long").write_bytes(bytes(11))
    with pytest.raises(ValueError, match="`in` must name a letter of at most 10 bytes"):
        read_file(tmp_path / "long", argument="in", kind="letter", max_bytes=10)
