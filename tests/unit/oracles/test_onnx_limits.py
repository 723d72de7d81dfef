"""How much time and memory an ONNX file may take, whatever its graph is."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402  # onnx is optional

from gradsigns_lightning.oracles import OnnxOracle  # noqa: E402

IMAGES = torch.zeros(2, 1, 4, 5)


def write(path, nodes, weights, **answer):
    """Write a model that flattens its images to ``f``, from which ``nodes`` compute ``y``."""
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["f"]), *nodes],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 4, 5])],
        [helper.make_tensor_value_info("y", answer.get("kind", TensorProto.FLOAT), None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


def loop(path):
    """2^62 steps that do nothing."""
    number, truth = (
        helper.make_tensor_value_info(*a, []) for a in (("i", TensorProto.INT64), ("c", TensorProto.BOOL))
    )
    ends = [
        helper.make_tensor_value_info("d", TensorProto.BOOL, []),
        helper.make_tensor_value_info("b", TensorProto.FLOAT, None),
    ]
    start = helper.make_tensor_value_info("a", TensorProto.FLOAT, None)
    steps = [helper.make_node("Identity", [a], [b]) for a, b in (("c", "d"), ("a", "b"))]
    body = helper.make_graph(steps, "body", [number, truth, start], ends)
    write(path, [helper.make_node("Loop", ["n", "t", "f"], ["y"], body=body)], {"n": 2**62, "t": True})


def one_step(path):
    """A product of 16,000 x 16,000 numbers, which takes many seconds."""
    nodes = [
        helper.make_node("Expand", ["one", "shape"], ["large"]),
        helper.make_node("Gemm", ["large", "large"], ["product"]),
        helper.make_node("ReduceMean", ["product"], ["mean"], keepdims=0),
        helper.make_node("Add", ["f", "mean"], ["y"]),
    ]
    write(path, nodes, {"one": np.ones((1, 1), np.float32), "shape": [16_000, 16_000]})


READING = """
import sys, time, torch
from gradsigns_lightning.oracles import OnnxOracle

oracle = OnnxOracle(sys.argv[1], time_limit=0.3)
begin = time.monotonic()
try:
    oracle(torch.zeros(2, 1, 4, 5))
except ValueError as error:
    print(error)
print(time.monotonic() - begin)
"""


@pytest.mark.parametrize("graph", [loop, one_step])
def test_a_graph_that_does_not_end_is_left_in_time(tmp_path, graph):
    """This runs in a separate process, which must end by itself, too."""
    graph(tmp_path / "net.onnx")
    command = [sys.executable, "-c", READING, str(tmp_path / "net.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    message, seconds = done.stdout.splitlines()
    assert message.startswith("the ONNX model takes more than 0.3 seconds for 2 images")
    assert float(seconds) < (2 if graph is loop else 20)


INTERRUPTED = """
import os, signal, sys, threading, torch
from gradsigns_lightning.oracles import OnnxOracle

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background processes ignore
oracle = OnnxOracle(sys.argv[1])
for number in range(60):
    try:
        threading.Timer(0.0002 * (number % 30), os.kill, (os.getpid(), signal.SIGINT)).start()
        oracle(torch.zeros(2, 1, 4, 5))
    except KeyboardInterrupt:
        pass
print(threading.active_count(), "thread")
"""


def test_an_answer_is_interrupted_whenever_that_comes_and_leaves_no_thread_behind(tmp_path):
    loop(tmp_path / "net.onnx")
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "net.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 thread\n", "")


def test_a_graph_that_was_aborted_can_be_queried_again(tmp_path):
    loop(tmp_path / "net.onnx")
    oracle = OnnxOracle(tmp_path / "net.onnx", time_limit=0.2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"takes more than 0\.2 seconds"):
            oracle(IMAGES)


def test_a_graph_that_is_not_loaded_in_time_is_left(tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: time.sleep(30))
    loop(tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"`path`: the model in .* is not loaded in 0\.1 seconds"):
        OnnxOracle(tmp_path / "net.onnx", time_limit=0.1)


@pytest.mark.parametrize(
    ("limit", "kind"), [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError)]
)
def test_a_time_limit_is_a_positive_number(tmp_path, limit, kind):
    with pytest.raises(kind, match="`time_limit`"):
        OnnxOracle(tmp_path / "net.onnx", time_limit=limit)


def test_an_answer_of_many_scores_is_refused(tmp_path):
    """A gibibyte of 8-bit integers would become eight gibibytes of float64, several times over."""
    fill = helper.make_node(
        "ConstantOfShape", ["shape"], ["y"], value=numpy_helper.from_array(np.ones(1, np.uint8))
    )
    write(tmp_path / "net.onnx", [fill], {"shape": [2, 1 << 25]}, kind=TensorProto.UINT8)
    with pytest.raises(ValueError, match="it returns more than 33554432 scores"):
        OnnxOracle(tmp_path / "net.onnx")(IMAGES)


def shapes(n):
    """Return graphs that make a tensor ``large`` of at least ``n`` numbers: their nodes and added weights."""
    make = helper.make_node
    number, truth, many = (
        helper.make_tensor_value_info(*a) for a in (("i", 7, []), ("c", 9, []), ("a", 1, None))
    )
    ends = [helper.make_tensor_value_info(*a) for a in (("d", 9, []), ("b", 1, None))]
    through = make("Identity", ["c"], ["d"])
    doubled = helper.make_graph(
        [through, make("Concat", ["a", "a"], ["b"], axis=0)], "body", [number, truth, many], ends
    )
    steps = [through, make("Identity", ["a"], ["b"]), make("ConstantOfShape", ["part"], ["s"])]
    kept = helper.make_graph(
        steps, "body", [number, truth, many], [*ends, helper.make_tensor_value_info("s", 1, None)]
    )
    side, image = 1 << 14, np.ones((1, 1, 2, 2), np.float32)
    return {
        "Expand": ([make("Expand", ["one", "shape"], ["large"])], {"shape": [n]}),
        "ConstantOfShape": ([make("ConstantOfShape", ["shape"], ["large"])], {"shape": [n]}),
        "Tile": ([make("Tile", ["one", "shape"], ["large"])], {"shape": [n]}),
        "Range": (
            [make("Range", ["zero", "end", "step"], ["large"])],
            {"zero": np.int64(0), "end": np.int64(n), "step": np.int64(1)},
        ),
        "Pad": ([make("Pad", ["one", "shape"], ["large"])], {"shape": [0, n]}),
        "Resize": (
            [make("Resize", ["image", "", "scales"], ["large"])],
            {"image": image, "scales": np.float32([1, 1, side / 2, n / side / 2])},
        ),
        "OneHot": (
            [make("OneHot", ["index", "depth", "values"], ["large"])],
            {"index": [0], "depth": np.int64(n), "values": np.array([0, 1], np.float32)},
        ),
        "RandomNormal": ([make("RandomNormal", [], ["large"], shape=[n])], {}),
        "ConvTranspose": (
            [make("ConvTranspose", ["image", "kernel"], ["large"], strides=[side, n // side])],
            {"image": image, "kernel": np.ones((1, 1, 1, 1), np.float32)},
        ),
        "Gather": (
            [
                make("ConstantOfShape", ["shape"], ["zeros"], value=whole(0)),
                make("Gather", ["row", "zeros"], ["large"]),
            ],
            {"row": np.ones((1, side), np.float32), "shape": [n // side]},
        ),
        "MatMul": (
            [
                make("ConstantOfShape", ["tall"], ["column"]),
                make("ConstantOfShape", ["wide"], ["row"]),
                make("MatMul", ["column", "row"], ["large"]),
            ],
            {"tall": [side, 1], "wide": [1, n // side]},
        ),
        "Loop, doubled": (
            [make("Loop", ["n", "t", "one"], ["large"], body=doubled)],
            {"n": np.int64(40), "t": True},
        ),
        "Loop, kept": (
            [make("Loop", ["n", "t", "one"], ["same", "large"], body=kept)],
            {"n": np.int64(n // side), "t": True, "part": [side]},
        ),
    }


def whole(value):
    return numpy_helper.from_array(np.array([value], np.int64))


SHAPES = """
import re, resource, sys, torch
from pathlib import Path
from gradsigns_lightning.oracles import OnnxOracle, onnx

def most():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

onnx._MOST_MEMORY = 1 << 28
OnnxOracle("plain.onnx")(torch.zeros(2, 1, 4, 5))
before = most()
for file in sorted(Path.cwd().glob("graph*.onnx")):
    try:
        OnnxOracle(file)(torch.zeros(2, 1, 4, 5))
        print(file.stem, "answered")
    except ValueError as error:
        print(file.stem, most() - before, "was refused" if "cannot be run on images" in str(error) else error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process took")
def test_no_shape_takes_more_than_the_bound_in_a_library_call(tmp_path):
    """A gibibyte, which the machine has, and 16 tebibytes are both refused before they are allocated."""
    graphs = {f"{name} {n}": graph for n in (1 << 28, 1 << 42) for name, graph in shapes(n).items()}
    for i, (nodes, weights) in enumerate(graphs.values()):
        size = [
            helper.make_node("Size", ["large"], ["size"]),
            helper.make_node("Cast", ["size"], ["number"], to=1),
        ]
        end = helper.make_node("Add", ["f", "number"], ["y"])
        write(
            tmp_path / f"graph{i:02}.onnx", [*nodes, *size, end], {"one": np.ones(1, np.float32), **weights}
        )
    write(tmp_path / "plain.onnx", [helper.make_node("Identity", ["f"], ["y"])], {})
    done = subprocess.run(
        [sys.executable, "-c", SHAPES], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=True
    )
    lines = dict(zip(graphs, (line.split(" ", 2)[1:] for line in done.stdout.splitlines()), strict=True))
    assert {name: line for name, line in lines.items() if line[-1] != "was refused"} == {}
    assert max(int(line[0]) for line in lines.values()) < 400  # MiB


def test_an_operator_that_takes_memory_beside_its_tensors_by_its_attributes_is_refused(tmp_path):
    """It takes two gibibytes for a million answers, and not from an allocator that could be bounded."""
    regions = {
        "image": np.ones((1, 1, 4, 4), np.float32),
        "regions": np.float32([[0, 0, 3, 3]]),
        "which": [0],
    }
    align = helper.make_node(
        "RoiAlign", list(regions), ["y"], output_height=1000, output_width=1000, sampling_ratio=8
    )
    write(tmp_path / "net.onnx", [align], regions)
    with pytest.raises(ValueError, match=r"`path`: the model in .* must not use RoiAlign"):
        OnnxOracle(tmp_path / "net.onnx")


BESIDES = """
import re, resource, torch
from pathlib import Path
from gradsigns_lightning.oracles import OnnxOracle, onnx
from gradsigns_lightning.lazy import as_command

def most():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

onnx._MOST_IN_ALL = 1 << 29
before, bound = most(), resource.getrlimit(resource.RLIMIT_AS)
with as_command():
    oracle = OnnxOracle("net.onnx")
    try:
        oracle(torch.zeros(2, 1, 4, 5))
    except ValueError as error:
        print(most() - before, error)
    assert resource.getrlimit(resource.RLIMIT_AS) == bound
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process takes, and bounds it")
def test_what_operators_keep_beside_their_numbers_is_bounded_in_a_command(tmp_path):
    nodes = [
        helper.make_node("Range", ["zero", "end", "one"], ["many"]),
        helper.make_node("Unique", ["many"], ["unique"]),
        helper.make_node("ReduceMean", ["unique"], ["mean"], keepdims=0),
        helper.make_node("Add", ["f", "mean"], ["y"]),
    ]
    # take 60 MB, and Unique 2 GB
    numbers = {"zero": np.float32(0), "end": np.float32(15_000_000), "one": np.float32(1)}
    write(tmp_path / "net.onnx", nodes, numbers)
    done = subprocess.run(
        [sys.executable, "-c", BESIDES], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True
    )
    taken, message = done.stdout.split(" ", 1)
    assert int(taken) < 700  # MiB
    assert message.startswith("the ONNX model cannot be run on images")


def test_a_library_call_bounds_no_process(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "setrlimit", lambda *_: pytest.fail("the process is the caller's"))
    write(tmp_path / "net.onnx", [helper.make_node("Identity", ["f"], ["y"])], {})
    assert OnnxOracle(tmp_path / "net.onnx")(IMAGES).shape == (2, 20)


def packed(number, *parts):
    """Return a protobuf field that holds ``parts``."""
    content = b"".join(parts)
    length = len(content)
    size = b""
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


GRAPH, NODE, WEIGHT = 7, 1, 5
MANY = {
    "nodes": packed(GRAPH, packed(NODE) * 500_000),
    "graphs": packed(GRAPH, packed(NODE, packed(5, packed(11) * 70_000))),
    "names": packed(GRAPH, packed(NODE, packed(1) * 9_000_000)),
    "sides": packed(GRAPH, packed(WEIGHT, b"\x08\x00" * 9_000_000)),
    "whole numbers": packed(GRAPH, packed(WEIGHT, packed(7, bytes(300_000_000)))),
}


@pytest.mark.parametrize("parts", MANY)
def test_a_file_of_many_small_parts_is_refused_before_it_is_parsed(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(onnx, "ModelProto", Unread)
    (tmp_path / "net.onnx").write_bytes(MANY[parts])
    with pytest.raises(
        ValueError,
        match=r"`path`: the model in .* must take at most 2 GiB in memory besides "
        r"its weights",
    ):
        OnnxOracle(tmp_path / "net.onnx")


class Unread:
    """Stands for a model that must not be parsed."""

    DESCRIPTOR = onnx.ModelProto.DESCRIPTOR

    @staticmethod
    def FromString(content):  # noqa: N802  # protobuf's name
        pytest.fail("the file was parsed")


@pytest.mark.parametrize(
    "content",
    [
        b"\x3a\x05\x0a",
        b"\x3a\x03\x0a\x05\x00\x00",
        b"\x3b\x3c",
        b"\x08" + b"\x80" * 11,
        b"\x3a\x80",
        b"\xff" * 9,
    ],
)
def test_damaged_parts_are_one_clear_error(tmp_path, content):
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"`path`: .* is damaged or not an ONNX model that can be run"):
        OnnxOracle(tmp_path / "net.onnx")


def test_an_attributes_name_that_is_no_utf8_is_one_clear_error(tmp_path):
    file = tmp_path / "net.onnx"
    write(file, [helper.make_node("Concat", ["f", "f"], ["y"], axis=1)], {})
    OnnxOracle(file)
    file.write_bytes(file.read_bytes().replace(b"axis", b"ax\xff\xfe"))
    with pytest.raises(ValueError, match=r"`path`: .* is damaged or not an ONNX model that can be run"):
        OnnxOracle(file)
