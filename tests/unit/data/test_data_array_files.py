"""MNIST, Fashion-MNIST, CIFAR-10 and SVHN on tiny files in the official layouts."""

from __future__ import annotations

import gzip
import math
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from gradsigns_lightning.data import CIFAR10, MNIST, SVHN, Digits, FashionMNIST
from gradsigns_lightning.data.cifar10 import read_binary, read_pickled
from gradsigns_lightning.data.idx import read_idx
from gradsigns_lightning.data.matlab import read_arrays

RNG = np.random.default_rng(0)


def write_idx(path: Path, array: np.ndarray, compress: bool = False) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if compress:
        path = path.with_name(path.name + ".gz")
        data = gzip.compress(data)
    path.write_bytes(data)


def write_mnist(folder: Path, compress: bool = False) -> dict[str, np.ndarray]:
    arrays = {}
    for part, n in (("train", 40), ("t10k", 20)):
        arrays[part] = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte", arrays[part], compress)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(n) % 10, compress)
    return arrays


@pytest.fixture(autouse=True)
def _no_system_files(monkeypatch):
    monkeypatch.setattr(FashionMNIST, "_system_folders", ())


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("layout", ["", "raw"])
@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_idx_data_sets(tmp_path, kind, layout, compress):
    arrays = write_mnist(tmp_path / kind.__name__ / "raw" if layout else tmp_path, compress)
    module = kind(tmp_path, batch_size=16)
    module.setup()
    x, y = next(iter(module.train_dataloader()))
    assert x.shape == (16, 1, 28, 28)
    assert y.dtype == torch.int64
    raw = module.raw_images("test", class_index=3)
    assert torch.equal(raw, torch.from_numpy(arrays["t10k"][[3, 13]]).unsqueeze(1) / 255.0)
    normalized, labels = next(iter(module.test_dataloader()))
    assert labels.tolist() == [i % 10 for i in range(20)]
    assert torch.allclose(normalized[[3, 13]] * module.std[0] + module.mean[0], raw, atol=1e-6)
    assert len(module.raw_images("train")) == 36


def test_the_two_data_sets_have_their_own_statistics():
    assert MNIST("x").mean == (0.1307,)
    assert FashionMNIST("x").mean == (0.2860,)


def test_fashion_mnist_finds_the_system_package(tmp_path, monkeypatch):
    write_mnist(tmp_path / "system", compress=True)
    monkeypatch.setattr(FashionMNIST, "_system_folders", (tmp_path / "system",))
    assert len(FashionMNIST().raw_images("test")) == 20
    assert len(FashionMNIST(tmp_path / "absent").raw_images("test")) == 20


def test_absent_idx_files_say_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match=r"`root`.*train-images-idx3-ubyte.*download=True.*dataset-fashion-mnist"
    ):
        FashionMNIST(tmp_path).setup("fit")
    with pytest.raises(ValueError, match=r"`root`.*t10k-images-idx3-ubyte.*download=True"):
        MNIST(tmp_path).raw_images("test")


def test_download_needs_a_root():
    with pytest.raises(ValueError, match="`root`"):
        MNIST(download=True)


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST, CIFAR10])
def test_download_is_left_to_torchvision(tmp_path, monkeypatch, kind):
    from torchvision import datasets

    calls = []
    monkeypatch.setattr(datasets, kind.__name__, lambda root, **kwargs: calls.append((root, kwargs)))
    kind(tmp_path).prepare_data()
    assert calls == []
    kind(tmp_path, download=True).prepare_data()
    assert calls == [(str(tmp_path), {"download": True})]


def test_nothing_is_downloaded_where_the_files_are(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    write_mnist(tmp_path)
    MNIST(tmp_path, download=True).prepare_data()


def test_without_torchvision_a_download_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'gradsigns-lightning\[vision\]'"):
        MNIST(tmp_path, download=True).prepare_data()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\x0d\1\0\0\0\1\0",
        b"\0\0\x08\1\0\0\0\5abc",
        b"\0\0\x08\3\0",
        b"\0\0\x08\1",
        b"\0\0\x08\1\0\0\0\0",
        b"\0\0\x08\0x",
        b"\0\0\x08\xff" + b"\xff" * 1020,
    ],
)
def test_malformed_idx_files_are_refused(tmp_path, data):
    path = tmp_path / "x-ubyte"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="`path`") as caught:
        read_idx(path, sides=(), max_bytes=2000)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "sides", [(), (10,), (10, 784), (10, 28, 29), (10, 28, 28, 1), (0, 28, 28), (10, 0, 2**32 - 1)]
)
@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_of_other_items_are_refused(tmp_path, sides, compress):
    write_mnist(tmp_path, compress)
    file = tmp_path / ("t10k-images-idx3-ubyte.gz" if compress else "t10k-images-idx3-ubyte")
    head = bytes([0, 0, 8, len(sides)]) + b"".join(side.to_bytes(4, "big") for side in sides)
    data = head + bytes(math.prod(sides))
    file.write_bytes(gzip.compress(data) if compress else data)
    with pytest.raises(
        ValueError,
        match=r"`path` must (be an IDX file of .* with 3 axes|hold one or more items of shape \(28, 28\))",
    ):
        MNIST(tmp_path).raw_images("test")


@pytest.mark.parametrize(
    "change", [lambda data: data[:-9], lambda data: data[:20] + b"\xff" * 20, lambda data: b"no gzip"]
)
def test_damaged_gzip_files_are_refused(tmp_path, change):
    path = tmp_path / "x-ubyte.gz"
    path.write_bytes(change(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 200]) + RNG.bytes(200))))
    with pytest.raises(ValueError, match="`path` must be an IDX file"):
        read_idx(path, sides=(), max_bytes=1000)


def peak_of(read) -> int:
    """Return the most bytes that Python allocated while ``read`` was refused."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"bytes|n labels"):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compress", [False, True])
def test_no_idx_file_takes_more_than_an_official_one(tmp_path, compress):
    n_bytes = 2**29
    path = tmp_path / ("t10k-images-idx3-ubyte.gz" if compress else "t10k-images-idx3-ubyte")
    if compress:
        path.write_bytes(gzip.compress(bytes(n_bytes // 64), 1) * 64)
    else:
        with path.open("wb") as file:
            file.truncate(n_bytes)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(10))
    assert peak_of(lambda: MNIST(tmp_path).raw_images("test")) < 2**28


READ = {
    "pickle": "from gradsigns_lightning.data.cifar10 import read_pickled as read",
    "mnist": "from gradsigns_lightning.data import MNIST; read = lambda path: MNIST(path).raw_images('test')",
    "matlab": "from gradsigns_lightning.data.matlab import read_arrays as r; read = lambda path: r(path, "
    "'Xy', max_bytes=2**28)",
}


def refusal_of(reader: str, path: Path) -> tuple[str, int]:
    """Return the message with which a separate process refuses ``path``, and the KiB that it needed."""
    program = (
        f"import resource, sys\nfrom pathlib import Path\n{READ[reader]}\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    read(Path(sys.argv[1]))\nexcept ValueError as error:\n    print(error)\n"
        "print('KiB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    message, kib = done.stdout.rsplit("KiB", 1)
    return message, int(kib)


def test_idx_labels_of_no_images_are_not_converted(tmp_path):
    write_mnist(tmp_path)
    labels = bytes([0, 0, 8, 1]) + (2**26 - 8).to_bytes(4, "big") + bytes(2**26 - 8)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels, 9))
    assert (tmp_path / "t10k-labels-idx1-ubyte.gz").stat().st_size < 70_000
    message, kib = refusal_of("mnist", tmp_path)
    assert message.startswith("`images` must have shape (n, C, H, W) with n = 67108856")
    assert kib < 400_000


def element(kind: int, content: bytes, size: int | None = None) -> bytes:
    size = len(content) if size is None else size
    return struct.pack("<II", kind, size) + content + bytes(-len(content) % 8)


def array(name: bytes, shape: tuple[int, ...], content: bytes, kind: int = 9, flags: int = 0) -> bytes:
    """An array of a MATLAB file, with the element ``content`` for its numbers."""
    head = element(6, struct.pack("<II", kind | flags << 8, 0)) + element(
        5, struct.pack(f"<{len(shape)}i", *shape)
    )
    return element(14, head + element(1, name) + content)


def mat_file(*elements: bytes, plain: bool = False) -> bytes:
    """A MATLAB file of packed (or plain) elements."""
    packed = [zlib.compress(content) for content in elements]
    parts = elements if plain else [struct.pack("<II", 15, len(part)) + part for part in packed]
    return b"MATLAB 5.0".ljust(124) + b"\0\1IM" + b"".join(parts)


SHAPE = (32, 32, 3, 2)
X, Y = (
    array(b"X", SHAPE, element(2, RNG.bytes(6144))),
    array(b"y", (2, 1), struct.pack("<HHI", 2, 2, 7 | 10 << 8), kind=6),
)


@pytest.mark.parametrize("plain", [False, True])
def test_a_matlab_file_is_read_as_scipy_reads_it(tmp_path, plain):
    from scipy.io import loadmat

    other = array(b"Z", (1, 1), array(b"", (1, 1), element(9, bytes(8)), kind=6), kind=1)
    (tmp_path / "test_32x32.mat").write_bytes(mat_file(other, X, Y, plain=plain))
    known = loadmat(tmp_path / "test_32x32.mat")
    found = read_arrays(tmp_path / "test_32x32.mat", ["X", "y"], max_bytes=10**6)
    assert all(
        np.array_equal(found[name], known[name]) and found[name].dtype == known[name].dtype
        for name in ("X", "y")
    )
    assert SVHN(tmp_path).load_images(train=False).labels.tolist() == [7, 0]


def test_a_matlab_file_of_the_other_order_of_bytes_is_read(tmp_path):
    def swapped(kind, content):
        return struct.pack(">II", kind, len(content)) + content + bytes(-len(content) % 8)

    head = swapped(6, struct.pack(">II", 6, 0)) + swapped(5, struct.pack(">2i", 1, 2))
    array = swapped(
        14, head + struct.pack(">HHI", 1, 1, ord("y") << 24) + swapped(9, struct.pack(">2d", 3, 4))
    )
    (tmp_path / "a.mat").write_bytes(b"MATLAB 5.0".ljust(124) + b"\1\0MI" + array)
    assert read_arrays(tmp_path / "a.mat", ["y"], max_bytes=10**6)["y"].tolist() == [[3, 4]]


def test_no_matlab_file_unpacks_to_more_than_an_official_one(tmp_path):
    large = [array(name, (2**27 - 64, 1), element(2, bytes(2**27 - 64))) for name in (b"X", b"y", b"z")]
    (tmp_path / "test_32x32.mat").write_bytes(mat_file(*large))
    assert peak_of(lambda: SVHN(tmp_path).raw_images("test")) < 2**25


def cells(depth: int) -> bytes:
    """Nested cells, built from the inside, since each states the length of its content."""
    head = element(6, struct.pack("<II", 1, 0)) + element(5, struct.pack("<2i", 1, 1)) + element(1, b"")
    parts = [array(b"", (0, 0), element(9, b""), kind=6)]
    size = len(parts[0])
    for _ in range(depth):
        size += len(head)
        parts.append(struct.pack("<II", 14, size) + head)
        size += 8
    return b"".join(reversed(parts))


HARMFUL_ARRAYS = {
    "cells in cells": mat_file(array(b"X", (1, 1), cells(100_000), kind=1), Y),
    "cells in cells of the same name": mat_file(array(b"X", (1, 1), cells(100_000), kind=1), Y, X),
    "a length of gigabytes": mat_file(array(b"X", SHAPE, element(2, bytes(6144), 2**32 - 8)), Y, plain=True),
    "a packed length of gigabytes": mat_file(array(b"X", SHAPE, element(2, bytes(6144), 2**32 - 8)), Y),
    "a packed array of gigabytes": mat_file(X, Y)[:128]
    + struct.pack("<II", 15, 2**32 - 8)
    + zlib.compress(X),
    "very many arrays": mat_file(*[element(14, b"")] * 10**6, plain=True),
}


@pytest.mark.parametrize("name", HARMFUL_ARRAYS)
def test_no_matlab_file_ends_the_process_or_takes_its_memory(tmp_path, name):
    (tmp_path / "test_32x32.mat").write_bytes(HARMFUL_ARRAYS[name])
    message, kib = refusal_of("matlab", tmp_path / "test_32x32.mat")
    assert message
    assert kib < 100_000
    tracemalloc.start()  # it counts requests, even where the system provides memory only on use
    try:
        with pytest.raises(ValueError, match="`root` must hold MATLAB files of SVHN"):
            SVHN(tmp_path).raw_images("test")
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_labels_of_no_images_are_not_converted(tmp_path):
    from scipy.io import savemat

    arrays = {"X": np.zeros((32, 32, 3, 1), np.uint8), "y": np.zeros((2**24, 1), np.uint8)}
    savemat(tmp_path / "test_32x32.mat", arrays, do_compression=True)
    assert peak_of(lambda: SVHN(tmp_path).raw_images("test")) < 2**26


PACKED = mat_file(X, Y)
BAD_CONTENT = {
    "empty": b"",
    "header alone": b"MATLAB 5.0",
    "no header": b"x" * 200,
    "an empty element": mat_file(b""),
    "no array": mat_file(b"x" * 99),
    "no arrays": PACKED[:128],
    "version 7.3": PACKED[:125] + b"\2" + PACKED[126:],
    "cut off": PACKED[:-3],
    "cut off in a tag": PACKED + b"\0\0\0",
    "no checksum": mat_file(X) + struct.pack("<II", 15, len(zlib.compress(Y)) - 4) + zlib.compress(Y)[:-4],
    "longer than it says": mat_file(X + b"x", Y),
    "not packed": mat_file(X) + element(15, b"x" * 80),
    "no y": mat_file(X),
    "X twice": mat_file(X, X, Y),
    "complex": mat_file(array(b"X", SHAPE, element(2, bytes(6144)), flags=8), Y),
    "logical": mat_file(array(b"X", SHAPE, element(2, bytes(6144)), flags=2), Y),
    "text": mat_file(array(b"X", SHAPE, element(2, bytes(6144)), kind=4), Y),
    "texts' bytes": mat_file(array(b"X", SHAPE, element(16, bytes(6144))), Y),
    "doubles": mat_file(array(b"X", SHAPE, element(9, bytes(6144 * 8)), kind=6), Y),
    "no shape": mat_file(array(b"X", (), element(2, b"")), Y),
    "negative sides": mat_file(array(b"X", (-32, -32, 3, 2), element(2, bytes(6144))), Y),
    "no images": mat_file(array(b"X", (32, 32, 3, 0), element(2, b"")), array(b"y", (0, 1), element(2, b""))),
    "too few bytes": mat_file(array(b"X", SHAPE, element(2, bytes(6143))), Y),
    "too many axes": mat_file(array(b"X", (1,) * 33, element(2, b"x")), Y),
    "too many labels": mat_file(X, array(b"y", (3, 1), element(2, b"\1\1\1"))),
    "a label of 11": mat_file(X, array(b"y", (2, 1), element(2, b"\1\x0b"))),
    "a label of no number": mat_file(
        X, array(b"y", (2, 1), element(9, struct.pack("<2d", 1, math.nan)), kind=6)
    ),
    "half a label": mat_file(X, array(b"y", (2, 1), element(9, struct.pack("<2d", 1, 1.5)), kind=6)),
}


@pytest.mark.parametrize("name", BAD_CONTENT)
def test_what_is_no_matlab_file_of_svhn_is_refused(tmp_path, name):
    (tmp_path / "test_32x32.mat").write_bytes(BAD_CONTENT[name])
    with pytest.raises(ValueError, match=r"`root` must hold MATLAB files of SVHN, got .*test_32x32\.mat: ."):
        SVHN(tmp_path).raw_images("test")


def test_no_binary_batch_is_larger_than_an_official_one(tmp_path):
    with (tmp_path / "test_batch.bin").open("wb") as file:
        file.truncate(3073 * 2**18)
    assert peak_of(lambda: read_binary(tmp_path / "test_batch.bin")) < 2**20


def test_where_images_come_from_is_told(tmp_path):
    write_mnist(tmp_path)
    assert MNIST(tmp_path).origin(train=False) == str(tmp_path / "t10k-images-idx3-ubyte")
    write_cifar_binary(tmp_path / "cifar-10-batches-bin", ["test_batch"])
    assert CIFAR10(tmp_path).origin(train=False) == str(tmp_path / "cifar-10-batches-bin")
    assert SVHN(tmp_path).origin(train=True) == str(tmp_path / "train_32x32.mat")
    assert Digits().origin(train=False) == "scikit-learn"


def write_cifar_binary(folder: Path, names: list[str], n: int = 4) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = {name: RNG.integers(0, 256, (n, 3072), dtype=np.uint8) for name in names}
    for name, array in pixels.items():
        records = np.concatenate([np.arange(n, dtype=np.uint8)[:, None], array], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return pixels


def write_cifar_python(folder: Path, names: list[str], n: int = 4) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = {name: RNG.integers(0, 256, (n, 3072), dtype=np.uint8) for name in names}
    for name, array in pixels.items():
        batch = {
            b"batch_label": b"x",
            b"labels": list(range(n)),
            b"data": array,
            b"filenames": [b"a.png"] * n,
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=3))
    return pixels


NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


@pytest.mark.parametrize(
    ("folder", "write"),
    [("cifar-10-batches-bin", write_cifar_binary), ("cifar-10-batches-py", write_cifar_python)],
)
def test_cifar10_layouts(tmp_path, folder, write):
    pixels = write(tmp_path / folder, NAMES)
    module = CIFAR10(tmp_path, val_fraction=0.0)
    train = module.raw_images("train")
    expected = np.concatenate([pixels[name] for name in NAMES[:5]]).reshape(-1, 3, 32, 32)
    assert torch.equal(train, torch.from_numpy(expected) / 255.0)
    assert torch.equal(
        module.raw_images("test", class_index=2),
        torch.from_numpy(pixels["test_batch"][[2]]).view(1, 3, 32, 32) / 255.0,
    )
    x, y = next(iter(module.test_dataloader()))
    assert y.tolist() == [0, 1, 2, 3]
    back = x * torch.tensor(module.std).view(1, 3, 1, 1) + torch.tensor(module.mean).view(1, 3, 1, 1)
    assert torch.allclose(back, module.raw_images("test"), atol=1e-6)


def test_cifar10_prefers_the_binary_version(tmp_path):
    binary = write_cifar_binary(tmp_path / "cifar-10-batches-bin", NAMES)
    write_cifar_python(tmp_path / "cifar-10-batches-py", NAMES)
    raw = CIFAR10(tmp_path).raw_images("test")
    assert torch.equal(raw, torch.from_numpy(binary["test_batch"]).view(-1, 3, 32, 32) / 255.0)


def test_an_incomplete_cifar10_is_absent(tmp_path):
    write_cifar_binary(tmp_path / "cifar-10-batches-bin", NAMES[1:])
    with pytest.raises(ValueError, match=r"`root`.*cifar-10-batches-bin.*data_batch_1.*download=True"):
        CIFAR10(tmp_path).setup("fit")


def test_a_cut_binary_batch_is_refused(tmp_path):
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(b"\0" * 3072)
    with pytest.raises(ValueError, match="3073"):
        read_binary(path)


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_a_pickle_that_names_a_function_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("batch").write_bytes(pickle.dumps({b"data": Harmful(), b"labels": [0]}, protocol=3))
    with pytest.raises(ValueError, match=r"`path`.*no CIFAR-10 batch does"):
        read_pickled(Path("batch"))
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    "content", [{b"data": [0]}, {b"data": np.zeros((1, 5), np.uint8), b"labels": [0]}, [1]]
)
def test_another_pickle_is_refused(tmp_path, content):
    (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol=3))
    with pytest.raises(ValueError, match="`path` must be a pickled CIFAR-10 batch"):
        read_pickled(tmp_path / "batch")


def big(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def python2_batch(pixels: bytes, n: int) -> bytes:
    """A batch as Python 2 and its NumPy wrote the official ones: byte strings, and a function's old name."""
    state = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    data = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t(K\x01M"
        + struct.pack("<H", n)
        + b"M\x00\x0c\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b"
        + state
        + b"\x89T"
        + struct.pack("<I", len(pixels))
        + pixels
        + b"tb"
    )
    labels = b"]q\x05(" + b"".join(b"K" + bytes([i % 10]) for i in range(n)) + b"e"
    names = b"]q\x0c(" + b"U\x05a.png" * n + b"e"
    head = b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03"
    return head + b"U\x06labelsq\x04" + labels + b"U\x04dataq\x06" + data + b"U\tfilenames" + names + b"u."


def test_a_batch_of_python_2_is_read(tmp_path):
    pixels = RNG.integers(0, 256, (300, 3072), dtype=np.uint8)
    (tmp_path / "data_batch_1").write_bytes(python2_batch(pixels.tobytes(), 300))
    with (tmp_path / "data_batch_1").open("rb") as file:
        assert np.array_equal(pickle.load(file, encoding="bytes")[b"data"], pixels)
    images, labels = read_pickled(tmp_path / "data_batch_1")
    assert np.array_equal(images.numpy().reshape(300, 3072), pixels)
    assert labels.tolist() == [i % 10 for i in range(300)]


def array_batch(array: bytes) -> bytes:
    return b"\x80\x03}(C\x04data" + array + b"C\x06labels](K\x01eu."


OBJECTS = b"cnumpy\ndtype\nX\x02\0\0\0O8\x89\x88\x87R"
HARMFUL_BATCHES = {
    "pointers": array_batch(
        b"cnumpy\nndarray\n(M\0\x0c\x85" + OBJECTS + b"B\0\x60\0\0" + b"AAAAAA\0\0" * 3072 + b"tR"
    ),
    "an array of terabytes": array_batch(b"cnumpy\nndarray\n(" + big(10**12) + b"\x85tR"),
    "a deep key": b"\x80\x03})" + b"\x85" * 600_000 + b"K\x01s.",
    "a memo of gigabytes": b"\x80\x03}r\xff\xff\xff\x0f.",
}


@pytest.mark.parametrize("name", HARMFUL_BATCHES)
def test_a_batch_that_would_end_the_process_is_refused(tmp_path, name):
    (tmp_path / "batch").write_bytes(HARMFUL_BATCHES[name])
    message, kib = refusal_of("pickle", tmp_path / "batch")
    assert message.startswith("`path` must be a pickled CIFAR-10 batch")
    assert kib < 200_000


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({b"data": PIXELS.astype(np.int64)}, "not an array of bytes"),
        ({b"data": np.asfortranarray(PIXELS)}, "another shape"),
        ({b"data": PIXELS.reshape(-1)}, "another shape"),
        ({b"data": PIXELS[:1]}, "2 labels and 3072 bytes"),
        ({b"data": PIXELS.tobytes()}, "not an array of bytes"),
        ({b"data": PIXELS[:0]}, "not an array of bytes"),
        ({b"labels": [0, 10]}, r"not all in \[0, 9\]"),
        ({b"labels": [0, "1"]}, "not a list of integers"),
        ({b"labels": (0, 1)}, "not a list of integers"),
        ({(1, 2): 3}, "a key of a dictionary"),
    ],
)
def test_a_batch_of_other_arrays_or_labels_is_refused(tmp_path, changes, message):
    batch = {b"data": PIXELS, b"labels": [0, 1]}
    (tmp_path / "batch").write_bytes(pickle.dumps(batch, protocol=3))
    assert len(read_pickled(tmp_path / "batch")[0]) == 2
    (tmp_path / "batch").write_bytes(pickle.dumps({**batch, **changes}, protocol=3))
    with pytest.raises(ValueError, match=f"`path` must be a pickled CIFAR-10 batch.*{message}"):
        read_pickled(tmp_path / "batch")


def test_a_batch_that_is_much_too_long_is_not_read(tmp_path):
    with (tmp_path / "batch").open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(ValueError, match="more than 67108864 bytes"):
        read_pickled(tmp_path / "batch")


def write_svhn(root: Path) -> dict[str, np.ndarray]:
    from scipy.io import savemat

    arrays = {}
    for part, n in (("train", 20), ("test", 10)):
        arrays[part] = RNG.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        savemat(
            root / f"{part}_32x32.mat",
            {"X": arrays[part], "y": (np.arange(n, dtype=np.uint8)[:, None] % 10) + 1},
        )
    return arrays


def test_svhn(tmp_path):
    arrays = write_svhn(tmp_path)
    module = SVHN(tmp_path)
    _, y = next(iter(module.test_dataloader()))
    assert y.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    zero = module.raw_images("test", class_index=0)
    assert torch.equal(zero[0], torch.from_numpy(arrays["test"][:, :, :, 9]).permute(2, 0, 1) / 255.0)
    assert next(iter(module.train_dataloader()))[0].shape == (18, 3, 32, 32)


def test_absent_svhn_files(tmp_path):
    with pytest.raises(ValueError, match=r"`root`.*train_32x32\.mat.*download=True"):
        SVHN(tmp_path).setup("fit")


def test_another_mat_file_is_refused(tmp_path):
    from scipy.io import savemat

    savemat(tmp_path / "test_32x32.mat", {"X": np.zeros((3, 3))})
    with pytest.raises(ValueError, match="`root`"):
        SVHN(tmp_path).setup("test")


def test_svhn_downloads_the_absent_files_only(tmp_path, monkeypatch):
    from torchvision import datasets

    write_svhn(tmp_path)
    (tmp_path / "test_32x32.mat").unlink()
    calls = []
    monkeypatch.setattr(datasets, "SVHN", lambda root, **kwargs: calls.append(kwargs))
    SVHN(tmp_path, download=True).prepare_data()
    assert calls == [{"split": "test", "download": True}]
