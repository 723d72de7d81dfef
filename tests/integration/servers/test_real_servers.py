"""Reading through the servers that people run: LitServe, MLServer, MLflow; started here, on loopback."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from gradsigns_lightning import WatermarkKey, verify_api
from gradsigns_lightning.oracles import (
    HttpOracle,
    JsonTemplate,
    MlflowProtocol,
    OnnxOracle,
    OpenInferenceProtocol,
)

pytest.importorskip("onnx")
requests = pytest.importorskip("requests")

HERE = Path(__file__).parent
SHAPE = (3, 16, 16)
KEY = WatermarkKey.generate("A", 64, input_shape=SHAPE, target_class=2, n_carriers=384, secret=bytes(32))
IMAGES = 0.2 + 0.6 * torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(1))
PATIENCE = 120  # seconds until a server must answer


@pytest.fixture(scope="module")
def onnx_file(planted, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    network = nn.Sequential(planted(KEY), nn.Softmax(1)).eval()
    names = {
        "input_names": ["images"],
        "output_names": ["scores"],
        "dynamic_axes": {"images": {0: "n"}, "scores": {0: "n"}},
    }
    torch.onnx.export(network, (IMAGES[:2],), str(path), dynamo=False, **names)
    return path


@pytest.fixture
def port():
    return free_ports(1)[0]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


@contextmanager
def running(command, url, folder, **environment):
    """Run a server until the block ends."""
    log = folder / "server.log"
    # A session of its own, so that the workers end with it.
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=folder,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        end = time.monotonic() + PATIENCE
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def is_ready(url):
    try:
        return requests.get(url, timeout=2).ok
    except requests.RequestException:
        return False


def script(name):
    return Path(sys.executable).parent / name


def check(oracle, onnx_file):
    """Check that a server responds as the file does, and proves the key within the same queries."""
    expected = verify_api(OnnxOracle(onnx_file), KEY, IMAGES)
    assert expected.verdict == "owned"
    result = verify_api(oracle, KEY, IMAGES)
    assert (result.verdict, result.n_queries, result.n_matches) == (
        "owned",
        expected.n_queries,
        expected.n_matches,
    )


def test_litserve(onnx_file, port, tmp_path):
    pytest.importorskip("litserve")
    with running(
        [sys.executable, HERE / "with_litserve.py", onnx_file, port],
        f"http://127.0.0.1:{port}/health",
        tmp_path,
    ):
        oracle = HttpOracle(
            f"http://127.0.0.1:{port}/predict", JsonTemplate({"images": "$images"}, answer="/scores")
        )
        check(oracle, onnx_file)


def test_mlserver(onnx_file, tmp_path):
    pytest.importorskip("mlserver")
    http, grpc, metrics = free_ports(3)
    settings = {
        "host": "127.0.0.1",
        "http_port": http,
        "grpc_port": grpc,
        "metrics_port": metrics,
        "parallel_workers": 0,
    }
    model = {
        "name": "net",
        "implementation": "with_mlserver.Runtime",
        "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, *SHAPE]}],
        "parameters": {"uri": str(onnx_file)},
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "model-settings.json").write_text(json.dumps(model))
    shutil.copy(HERE / "with_mlserver.py", tmp_path)
    base = f"http://127.0.0.1:{http}/v2"
    with running(
        [script("mlserver"), "start", tmp_path],
        f"{base}/models/net/ready",
        tmp_path,
        PYTHONPATH=str(tmp_path),
    ):
        check(HttpOracle(f"{base}/models/net", OpenInferenceProtocol()), onnx_file)


def test_mlflow(onnx_file, port, tmp_path):
    pyfunc = pytest.importorskip("mlflow.pyfunc")
    saved = tmp_path / "model"
    pyfunc.save_model(
        saved,
        python_model=str(HERE / "with_mlflow.py"),
        artifacts={"onnx": str(onnx_file)},
        pip_requirements=[],
    )
    serve = [
        script("mlflow"),
        "models",
        "serve",
        "-m",
        saved,
        "--env-manager",
        "local",
        "-h",
        "127.0.0.1",
        "-p",
        port,
    ]
    path = f"{script('mlflow').parent}{os.pathsep}{os.environ['PATH']}"  # it starts uvicorn from PATH
    with running(serve, f"http://127.0.0.1:{port}/ping", tmp_path, PATH=path):
        check(HttpOracle(f"http://127.0.0.1:{port}", MlflowProtocol()), onnx_file)
