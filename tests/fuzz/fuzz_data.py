"""Files of data sets."""

import gzip
import importlib.util
import io
import pickletools
import struct
import zlib
from pathlib import Path

from fuzz_base import FOLDER, Reader

IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
BATCHES = ("cifar-10-batches-bin/test_batch.bin", "cifar-10-batches-py/test_batch")
PLACES = (IMAGES, f"{IMAGES}.gz", LABELS, *BATCHES, "test_32x32.mat")
PICKLE, MATLAB = 4, 5


def dataset():
    """A file of a data set at the place that the first byte selects; the data set's other files are genuine.

    Image files have a target of their own.
    """
    from scipy.io import savemat

    from gradsigns_lightning.data import CIFAR10, MNIST, SVHN

    samples = _samples()
    modules = (MNIST, MNIST, MNIST, CIFAR10, CIFAR10, SVHN)
    roots = [FOLDER / f"data{number}" for number in range(len(PLACES))]
    for root, place in zip(roots, PLACES, strict=True):
        (root / place).parent.mkdir(parents=True)
    images, labels = samples.RNG.integers(0, 256, (2, 3072), dtype="uint8"), [3, 9]
    for root in roots[:3]:
        samples.write_idx(root / IMAGES, images[:, :784].reshape(2, 28, 28), compress=root == roots[1])
        samples.write_idx(root / LABELS, samples.np.array(labels))
    samples.write_cifar_binary(roots[3] / "cifar-10-batches-bin", ["test_batch"], n=2)
    samples.write_cifar_python(roots[4] / "cifar-10-batches-py", ["test_batch"], n=2)

    def matlab(**options):
        file = io.BytesIO()
        arrays = {"X": images[0].reshape(32, 32, 3, 1), "y": samples.np.array([[10.0]]), "z": {"a": [1, "x"]}}
        savemat(file, arrays, **options)
        return file.getvalue()

    (roots[5] / PLACES[5]).write_bytes(matlab(do_compression=True))
    seeds = [bytes([number]) + (root / PLACES[number]).read_bytes() for number, root in enumerate(roots)]
    seeds += [bytes([PICKLE]) + samples.python2_batch(images.tobytes(), 2), bytes([MATLAB]) + matlab()]

    def write(data):
        (roots[_place(data)] / PLACES[_place(data)]).write_bytes(data[1:])

    def read(data):
        return modules[_place(data)](roots[_place(data)]).raw_images("test")

    return Reader(read, seeds, write, unpack, pack)


def _samples():
    """Return the module of the readers' tests, which writes such files."""
    path = Path(__file__).parents[1] / "unit" / "data" / "test_data_array_files.py"
    specification = importlib.util.spec_from_file_location("samples", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _place(data):
    return (data[0] if data else 0) % len(PLACES)


def unpack(data):
    """Return a file as plain values: hexadecimal contents, steps of a pickle, elements of a MATLAB file."""
    place, content = _place(data), data[1:]
    if place == PICKLE:
        starts = [position for _, _, position in pickletools.genops(content)]
        steps = [
            content[start:end].hex() for start, end in zip(starts, [*starts[1:], len(content)], strict=True)
        ]
        return {"place": place, "steps": steps}
    if place == MATLAB:
        return {"place": place, "head": content[:128].hex(), "elements": _elements(content[128:])}
    content = gzip.decompress(content) if PLACES[place].endswith(".gz") else content
    start = 4 + 4 * content[3] if "idx" in PLACES[place] else 1
    return {"place": place, "head": list(content[:start]), "hex": content[start:].hex()}


def pack(value):
    place = value["place"]
    if place == PICKLE:
        content = b"".join(map(bytes.fromhex, value["steps"]))
    elif place == MATLAB:
        content = bytes.fromhex(value["head"]) + _joined(value["elements"])
    else:
        # of a number, bytes would make so many
        content = bytes([*value["head"]]) + bytes.fromhex(value["hex"])
        content = gzip.compress(content, mtime=0) if PLACES[place].endswith(".gz") else content
    return bytes([place]) + content


def _elements(data):
    parts, at = [], 0
    while at < len(data):
        kind, size = struct.unpack_from("<II", data, at)
        start = at + 8
        if kind >> 16:
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        content = data[start : start + size]
        part = {"kind": kind, "size": None, "short": start == at + 4}
        if kind == 15:
            part["parts"] = _elements(zlib.decompress(content))
        elif kind == 14:
            part["parts"] = _elements(content)
        else:
            part["hex"] = content.hex()
        parts.append(part)
        at = max(at + 8, start + size)
        at += -at % 8 if kind != 15 else 0
    return parts


def _joined(parts):
    """Return elements as bytes; the length that they state is the true one, unless ``size`` gives another."""
    data = b""
    for part in parts:
        content = _joined(part["parts"]) if "parts" in part else bytes.fromhex(part["hex"])
        content = zlib.compress(content) if part["kind"] == 15 else content
        size = len(content) if part["size"] is None else part["size"]
        head = (
            struct.pack("<HH", part["kind"], size)
            if part["short"]
            else struct.pack("<II", part["kind"], size)
        )
        data += head + content
        data += bytes(-len(data) % 8) if part["kind"] != 15 else b""
    return data
