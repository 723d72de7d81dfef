"""MNIST, Fashion-MNIST, CIFAR-10 and SVHN on tiny files in the official layouts."""

from __future__ import annotations

import gzip
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
    normalised, labels = next(iter(module.test_dataloader()))
    assert labels.tolist() == [i % 10 for i in range(20)]
    assert torch.allclose(normalised[[3, 13]] * module.std[0] + module.mean[0], raw, atol=1e-6)
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
    with pytest.raises(ValueError, match=r"`root`.*train-images-idx3-ubyte.*download=True.*dataset-fashion-mnist"):
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
    "data", [b"", b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", b"\x00\x00\x08\x01\x00\x00\x00\x05abc", b"\x00\x00\x08\x03\x00"]
)
def test_malformed_idx_files_are_refused(tmp_path, data):
    path = tmp_path / "x-ubyte"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="`path`"):
        read_idx(path, max_bytes=100)


@pytest.mark.parametrize("change", [lambda data: data[:-9], lambda data: data[:20] + b"\xff" * 20, lambda data: b"no gzip"])
def test_damaged_gzip_files_are_refused(tmp_path, change):
    path = tmp_path / "x-ubyte.gz"
    path.write_bytes(change(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 200]) + RNG.bytes(200))))
    with pytest.raises(ValueError, match="`path` must be an IDX file"):
        read_idx(path, max_bytes=1000)


def peak_of(read) -> int:
    """Return the most bytes that Python took while ``read`` was refused."""
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


def mat_file(*elements: bytes) -> bytes:
    """A MATLAB file of packed elements."""
    packed = [zlib.compress(element) for element in elements]
    return b"MATLAB 5.0".ljust(124) + b"\0\1IM" + b"".join(struct.pack("<II", 15, len(part)) + part for part in packed)


def test_no_matlab_file_unpacks_to_more_than_an_official_one(tmp_path):
    (tmp_path / "test_32x32.mat").write_bytes(mat_file(bytes(2**28), bytes(2**28), bytes(2**20)))
    assert peak_of(lambda: SVHN(tmp_path).raw_images("test")) < 2**25


def test_labels_of_no_images_are_not_converted(tmp_path):
    from scipy.io import savemat

    arrays = {"X": np.zeros((32, 32, 3, 1), np.uint8), "y": np.zeros((2**24, 1), np.uint8)}
    savemat(tmp_path / "test_32x32.mat", arrays, do_compression=True)
    assert peak_of(lambda: SVHN(tmp_path).raw_images("test")) < 2**26


@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0", b"x" * 200, mat_file(b""), mat_file(b"x" * 99)])
def test_what_is_no_matlab_file_of_svhn_is_refused(tmp_path, content):
    (tmp_path / "test_32x32.mat").write_bytes(content)
    with pytest.raises(ValueError, match="`root` must hold MATLAB files"):
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
        batch = {b"batch_label": b"x", b"labels": list(range(n)), b"data": array, b"filenames": [b"a.png"] * n}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=3))
    return pixels


NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


@pytest.mark.parametrize(
    ("folder", "write"), [("cifar-10-batches-bin", write_cifar_binary), ("cifar-10-batches-py", write_cifar_python)]
)
def test_cifar10_layouts(tmp_path, folder, write):
    pixels = write(tmp_path / folder, NAMES)
    module = CIFAR10(tmp_path, val_fraction=0.0)
    train = module.raw_images("train")
    expected = np.concatenate([pixels[name] for name in NAMES[:5]]).reshape(-1, 3, 32, 32)
    assert torch.equal(train, torch.from_numpy(expected) / 255.0)
    assert torch.equal(
        module.raw_images("test", class_index=2), torch.from_numpy(pixels["test_batch"][[2]]).view(1, 3, 32, 32) / 255.0
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


@pytest.mark.parametrize("content", [{b"data": [0]}, {b"data": np.zeros((1, 5), np.uint8), b"labels": [0]}, [1]])
def test_another_pickle_is_refused(tmp_path, content):
    (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol=3))
    with pytest.raises(ValueError, match="`path` must be a pickled CIFAR-10 batch"):
        read_pickled(tmp_path / "batch")


def big(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def python2_batch(pixels: bytes, n: int) -> bytes:
    """A batch as Python 2 and its NumPy wrote the official ones: texts of bytes, and the old name of a function."""
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
    "pointers": array_batch(b"cnumpy\nndarray\n(M\0\x0c\x85" + OBJECTS + b"B\0\x60\0\0" + b"AAAAAA\0\0" * 3072 + b"tR"),
    "an array of terabytes": array_batch(b"cnumpy\nndarray\n(" + big(10**12) + b"\x85tR"),
    "a deep key": b"\x80\x03})" + b"\x85" * 600_000 + b"K\x01s.",
    "a memo of gigabytes": b"\x80\x03}r\xff\xff\xff\x0f.",
}


@pytest.mark.parametrize("name", HARMFUL_BATCHES)
def test_a_batch_that_would_end_the_process_is_refused(tmp_path, name):
    (tmp_path / "batch").write_bytes(HARMFUL_BATCHES[name])
    program = (
        "import resource, sys\nfrom pathlib import Path\nfrom gradsigns_lightning.data.cifar10 import read_pickled\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    read_pickled(Path(sys.argv[1]))\nexcept ValueError as error:\n    print(error)\n"
        "print('KiB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "batch")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    message, kib = done.stdout.rsplit("KiB", 1)
    assert message.startswith("`path` must be a pickled CIFAR-10 batch")
    assert int(kib) < 200_000


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({b"data": PIXELS.astype(np.int64)}, "no array of bytes"),
        ({b"data": np.asfortranarray(PIXELS)}, "another shape"),
        ({b"data": PIXELS.reshape(-1)}, "another shape"),
        ({b"data": PIXELS[:1]}, "2 labels and 3072 bytes"),
        ({b"data": PIXELS.tobytes()}, "no array of bytes"),
        ({b"data": PIXELS[:0]}, "no array of bytes"),
        ({b"labels": [0, 10]}, r"not all in \[0, 9\]"),
        ({b"labels": [0, "1"]}, "no list of integers"),
        ({b"labels": (0, 1)}, "no list of integers"),
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
        savemat(root / f"{part}_32x32.mat", {"X": arrays[part], "y": (np.arange(n, dtype=np.uint8)[:, None] % 10) + 1})
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
