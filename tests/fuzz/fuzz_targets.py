"""One target for each kind of file or answer that comes from others: how it is read, from what it starts, of what it is made."""

import importlib.util
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_mutation as plain

FOLDER = Path(tempfile.mkdtemp(prefix="gradsigns-fuzz-")).resolve()
SHAPE = (1, 4, 5)


@dataclass
class Reader:
    """How one kind of input is read; ``write`` lays it where ``read`` takes it, ``unpack`` and ``pack`` give plain values."""

    read: Callable[[bytes], Any]
    seeds: list[bytes]
    write: Callable[[bytes], Any] = lambda data: None
    unpack: Callable[[bytes], Any] = plain.from_json
    pack: Callable[[Any], bytes] = plain.to_json
    errors: tuple[type[Exception], ...] = (ValueError,)
    warm_up: tuple[bytes, ...] = (b"", b"\x00", b"{}", b"[]\n")


@dataclass
class Target:
    make: Callable[[], Reader]
    instrument: tuple[str, ...] = ()


def owned():
    """Return a key, images of its shape, and a signer; the same in every run."""
    import torch
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from gradsigns_lightning import WatermarkKey

    key = WatermarkKey.generate("A", 8, input_shape=SHAPE, target_class=1, secret=bytes(32))
    images = (torch.rand(9, *SHAPE, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    return key, images, Ed25519PrivateKey.from_private_bytes(bytes(32))


def predict(images):
    """A model of two classes."""
    import torch

    return torch.stack([images.flatten(1).mean(1), 1 - images.flatten(1).mean(1)], 1)


def key_file():
    from safetensors.numpy import load, save

    from gradsigns_lightning import WatermarkKey

    path = FOLDER / "a.gskey"
    seeds = []
    for owner, options in (("A", {}), ("株\x1b\n\ud800", {"payload": b"x", "scope": "s", "input_mean": (0.5,)})):
        WatermarkKey.generate(owner, 8, input_shape=SHAPE, target_class=1, secret=bytes(32), **options).save(path, overwrite=True)
        seeds.append(path.read_bytes())

    def unpack(data):
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        tensors = {name: values.tolist() for name, values in load(data).items()}
        return {"metadata": {**metadata, "key": json.loads(metadata["key"])}, "tensors": tensors}

    def pack(value):
        import numpy as np

        tensors = {name: np.array(values, dtype=np.uint8) for name, values in value["tensors"].items()}
        texts = {name: text if isinstance(text, str) else json.dumps(text) for name, text in value["metadata"].items()}
        return save(tensors, texts)

    return Reader(lambda data: repr(WatermarkKey.load(path)), seeds, path.write_bytes, unpack, pack)


def commitment():
    from gradsigns_lightning.extraction.evidence import Statement, make_statement

    key, _, signer = owned()
    seeds = [make_statement([key.commitment] * n, signer).to_bytes() for n in (1, 3)]
    return Reader(Statement.from_bytes, seeds, unpack=plain.from_json, pack=plain.to_canonical)


def journal():
    from gradsigns_lightning import verify_api
    from gradsigns_lightning.extraction.asking import read_journal
    from gradsigns_lightning.extraction.black_box import replay

    key, images, _ = owned()
    path, seeds = FOLDER / "a.jsonl", []
    for answer in (predict, lambda x: predict(x).argmax(1)):
        path.unlink(missing_ok=True)
        verify_api(answer, key, images, max_queries=40, alpha=0.5, journal=path)
        seeds.append(path.read_bytes())
    path.with_suffix(".jsonl.lock").unlink(missing_ok=True)
    pixels = (images * 255).byte()
    return Reader(
        lambda data: replay(key, pixels, read_journal(path)), seeds, path.write_bytes, plain.from_lines, plain.to_lines
    )


def bundle():
    """A bundle as it is; and signed and committed to anew after a change, as a dishonest claimant would."""
    from gradsigns_lightning import WatermarkKey
    from gradsigns_lightning.extraction.asking import read_journal
    from gradsigns_lightning.extraction.evidence import Bundle, Statement, judge, make_statement

    key, images, signer = owned()
    path = FOLDER / "a.gsbundle"
    (FOLDER / "b.jsonl").write_bytes(journal().seeds[0])
    parts = {"images": (images * 255).byte(), "transcript": read_journal(FOLDER / "b.jsonl")}
    statement, seeds = make_statement([key.commitment], signer), []
    for content in (parts, {}):
        path.unlink(missing_ok=True)
        Bundle(key=key, statement=statement, **content).save(path, signer)
        seeds.append(path.read_bytes())

    def pack(value):
        evidence = value["evidence"]
        try:
            parts = evidence["key"]
            made = WatermarkKey.from_parts(
                parts["public"], payload=bytes.fromhex(parts["payload"]), secret=bytes.fromhex(parts["secret"])
            )
            evidence["statement"] = make_statement([made.commitment], signer).to_bytes().decode()
        except (ValueError, TypeError, KeyError):
            pass
        signed = signer.sign(plain.to_canonical(evidence)[:-1]).hex()
        return plain.to_canonical({**value, "signature": signed})

    assert Statement.from_bytes(statement.to_bytes()) == statement
    return Reader(
        lambda data: judge(Bundle.load(path), grinding_bits=0).to_dict(), seeds, path.write_bytes, plain.from_json, pack
    )


def time_stamp():
    """A time-stamp authority's reply, DER; and its certificates, PEM."""
    from gradsigns_lightning.extraction.evidence import check_timestamp, make_statement, timestamp_request

    specification = importlib.util.spec_from_file_location("authorities", Path(__file__).parents[1] / "conftest.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    key, _, signer = owned()
    statement = make_statement([key.commitment], signer)
    authority = module.Authority(FOLDER / "authority")
    reply = authority.stamp(timestamp_request(statement))
    pem = authority.certificates.read_bytes()

    def read(data):
        if data.startswith(b"-----BEGIN"):
            return check_timestamp(reply, statement, data)
        return check_timestamp(data, statement, pem)

    return Reader(read, [reply, pem], unpack=plain.from_der, pack=plain.to_der)


def checkpoint():
    """Bytes of a file; a description and shapes of weights in JSON; or a pickle. The last two are put into a file of torch's form."""
    import torch

    from gradsigns_lightning import verify
    from gradsigns_lightning.cli.checkpoint import describe
    from gradsigns_lightning.cli.suspect import open_checkpoint
    from gradsigns_lightning.models import MLP, Classifier, SmallResNet, ViT

    key, images, _ = owned()
    path = FOLDER / "a.ckpt"
    data = {"name": "digits", "n_classes": 2, "input_shape": list(SHAPE), "mean": [0.0], "std": [1.0]}
    networks = (
        (MLP, {"input_shape": list(SHAPE), "n_classes": 2, "hidden": [3]}),
        (SmallResNet, {"in_channels": 1, "n_classes": 2, "width": 1}),
        (ViT, {"input_shape": list(SHAPE), "n_classes": 2, "patch_size": 1, "dim": 4, "depth": 1, "heads": 1}),
    )

    def seed(network, arguments):
        model = {"_target_": f"gradsigns_lightning.models.{network.__name__}", **arguments}
        weights = Classifier(network(**arguments), 2).state_dict()
        shapes = {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in weights.items()}
        return {"hyper_parameters": describe(model, data, key.commitment), "state_dict": shapes}

    def tensor(stated):
        if not isinstance(stated, list) or len(stated) != 2:
            return stated
        kind, shape = getattr(torch, str(stated[0])), stated[1]
        values = torch.zeros(shape, dtype=kind, device="meta")
        few = values.numel() <= 1 << 16
        return torch.ones(shape, dtype=kind) if few else torch.ones((), dtype=kind).expand(shape)  # larger than what is stored

    def write(given):
        if given.startswith(b"{"):
            try:
                content = json.loads(given)
                states = {name: tensor(stated) for name, stated in content["state_dict"].items()}
                torch.save({**content, "state_dict": states}, path)
            except Exception:  # no such file can be made
                path.write_bytes(given)
        elif given.startswith(b"\x80"):
            path.unlink(missing_ok=True)
            writer = torch._C.PyTorchFileWriter(str(path))
            for name, content in (("data.pkl", given), ("byteorder", b"little"), ("data/0", bytes(400)), ("data/1", bytes(40))):
                writer.write_record(name, content, len(content))
            writer.write_end_of_file()
        else:
            path.write_bytes(given)

    def read(_):
        suspect = open_checkpoint(str(path), key)
        verify(suspect.model, key, images)

    seeds = [plain.to_json(seed(*network)) for network in networks]
    write(seeds[0])
    seeds += [path.read_bytes(), torch.PyTorchFileReader(str(path)).get_record("data.pkl")]
    return Reader(read, seeds, write)


def onnx_file():
    """An ONNX file; changed as protobuf's JSON."""
    import numpy as np
    import onnx
    import onnxruntime
    from google.protobuf import json_format
    from onnx import TensorProto, helper, numpy_helper

    from gradsigns_lightning import verify_api
    from gradsigns_lightning.extraction.oracles import OnnxOracle

    onnxruntime.set_default_logger_severity(4)  # it writes to standard error what it thinks of each model
    key, images, _ = owned()
    path = FOLDER / "a.onnx"

    def model(nodes, weights, kind=TensorProto.FLOAT, n="n", functions=()):
        x = helper.make_tensor_value_info("x", kind, [n, *SHAPE])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])
        initial = [numpy_helper.from_array(value, name) for name, value in weights.items()]
        graph = helper.make_graph(nodes, "g", [x], [y], initial)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, functions=functions)

    matrix = np.arange(40, dtype=np.float32).reshape(20, 2) / 40
    dense = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    cast = [helper.make_node("Cast", ["x"], ["c"], to=TensorProto.FLOAT), helper.make_node("Flatten", ["c"], ["f"]), dense[1]]
    branch = helper.make_graph(
        [helper.make_node("Identity", ["f"], ["b"])], "b", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
    )
    forked = [dense[0], helper.make_node("If", ["t"], ["h"], then_branch=branch, else_branch=branch)]
    forked += [helper.make_node("MatMul", ["h", "w"], ["y"])]
    models = [
        model(dense, {"w": matrix}),
        model(cast, {"w": matrix}, TensorProto.UINT8, 1),
        model(forked, {"w": matrix, "t": np.array(True)}),
    ]
    outside = model(dense, {"w": matrix})
    onnx.external_data_helper.set_external_data(outside.graph.initializer[0], "../../../../etc/passwd")
    outside.graph.initializer[0].ClearField("raw_data")

    def read(_):
        result = verify_api(OnnxOracle(path), key, images, max_queries=20)
        if "externalData" in json_format.MessageToJson(onnx.ModelProto.FromString(path.read_bytes())):
            raise RuntimeError("a model with numbers in another file was run")
        return result

    def unpack(data):
        return json_format.MessageToDict(onnx.ModelProto.FromString(data))

    def pack(value):
        return json_format.ParseDict(value, onnx.ModelProto()).SerializeToString()

    seeds = [made.SerializeToString() for made in (*models, outside)]
    return Reader(read, seeds, path.write_bytes, unpack, pack)


def image():
    """An image in a folder; what it is, its content says."""
    import numpy as np
    from PIL import Image

    from gradsigns_lightning.cli.images import read_folder

    folder = FOLDER / "images"
    folder.mkdir()
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3) * 4
    seeds = []
    for form in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "ICO", "EPS", "TGA", "PCX"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format=form)
        seeds.append(file.getvalue())
    for mode, options in (("L", {}), ("P", {}), ("1", {}), ("RGBA", {"format": "TIFF", "compression": "tiff_lzw"})):
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, **{"format": "PNG", **options})
        seeds.append(file.getvalue())
    Image.init()
    return Reader(lambda data: read_folder(str(folder), (3, 4, 5)), seeds, (folder / "a.png").write_bytes, pack=lambda value: b"")


def server():
    """A server's reply, as {"status", "headers", "body"} or as the body alone."""
    import requests
    from urllib3 import HTTPResponse

    from gradsigns_lightning import verify_api
    from gradsigns_lightning.extraction.oracles import (
        HttpOracle,
        JsonTemplate,
        MlflowProtocol,
        OpenInferenceProtocol,
        OracleError,
    )

    key, images, _ = owned()
    url = "http://127.0.0.1:9/v2/models/m"
    protocols = (
        OpenInferenceProtocol,
        MlflowProtocol,
        lambda: JsonTemplate({"x": "$images"}, answer="/outputs"),
        lambda: JsonTemplate({"x": "$images"}, classes=["a", "b"]),
        lambda: JsonTemplate({"x": "$image"}, answer="/outputs/0/data"),
    )

    class Adapter(requests.adapters.BaseAdapter):
        """Hands out the reply without a socket."""

        def __init__(self):
            super().__init__()
            self.status, self.headers, self.body = 200, {}, b""

        def send(self, request, **_):
            raw = HTTPResponse(io.BytesIO(self.body), self.headers, self.status, preload_content=False)
            return requests.adapters.HTTPAdapter().build_response(request, raw)

        def close(self):
            pass

    adapter = Adapter()

    def write(data):
        adapter.status, adapter.headers, adapter.body = 200, {}, data
        try:
            reply = json.loads(data)
            headers = {str(name): str(value) for name, value in reply["headers"].items()}
            body = reply["body"].encode() if isinstance(reply["body"], str) else json.dumps(reply["body"]).encode()
            adapter.status, adapter.headers, adapter.body = int(reply["status"]), headers, body
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            pass  # the body alone

    def read(_):
        failed = None
        for protocol in protocols:
            oracle = HttpOracle(url, protocol(), retries=1, pause=0, longest_pause=0)
            oracle._session.mount("http://", adapter)
            try:
                verify_api(oracle, key, images, max_queries=20, batch_size=1)
            except (ValueError, OracleError) as error:
                failed = error
        if failed:
            raise failed

    tensor = {"name": "p", "shape": [1, 2], "datatype": "FP32", "data": [0.25, 0.75]}
    bodies = [
        {"inputs": [tensor], "outputs": [tensor]},
        {"predictions": [[0.25, 0.75]]},
        [{"label": "a", "score": 0.5}, {"label": "b", "score": 0.25}],
        {"outputs": [1]},
        "a",
    ]
    seeds = [plain.to_json(body) for body in bodies]
    for status, headers in ((200, {"Content-Type": "text/html"}), (503, {"Retry-After": "1"}), (302, {"Location": "http://x"})):
        seeds.append(plain.to_json({"status": status, "headers": headers, "body": bodies[0]}))
    seeds.append(plain.to_json({"status": 200, "headers": {"Content-Encoding": "gzip"}, "body": bodies[0]}))
    return Reader(read, seeds, write, errors=(ValueError, OracleError))


def released():
    """A file of the authors' release of 2021: one of the three arrays, or the Keras model."""
    import h5py
    import numpy as np

    from gradsigns_lightning.legacy import _NORM_NAMES, _keras_name, load_2021  # the names are tested against the release
    from gradsigns_lightning.models import ResNet20

    folder = FOLDER / "released"
    folder.mkdir()
    mask = np.zeros(3072, np.int8)
    mask[:16] = 1
    arrays = {"embed_key": np.ones((8, 16), np.float32), "grad_select": mask, "wm": np.arange(8) % 2}
    assert _NORM_NAMES

    def keras(n_weights):
        file = io.BytesIO()
        with h5py.File(file, "w") as model:
            state = {name: value for name, value in ResNet20(3, 10).state_dict().items() if not name.endswith("tracked")}
            for name, value in list(state.items())[:n_weights]:
                layer, _, parameter = name.rpartition(".")
                shape = tuple(value.shape)
                source, kind = _keras_name(layer, parameter).split("/")
                numbers = np.zeros((*shape[2:], *shape[1::-1]), np.float32)
                model.create_dataset(f"model_weights/{source}/{source}/{kind}:0", data=numbers)
        return file.getvalue()

    whole = keras(None)

    def lay(changed=None, content=b""):
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        (folder / "model.hdf5").write_bytes(whole)
        if changed:
            (folder / changed).write_bytes(content)

    def write(data):
        if data.startswith(b"\x89HDF"):
            lay("model.hdf5", data)
        else:
            lay(f"{list(arrays)[len(data) % 3]}.npy", data)

    seeds = [keras(5), keras(1)]
    for number, name in enumerate(arrays):
        lay()
        content = (folder / f"{name}.npy").read_bytes()
        seeds.append(content + bytes(-(len(content) - number) % 3))  # the length says which array it stands for
    return Reader(lambda data: load_2021(folder), seeds, write, pack=lambda value: b"")


TARGETS = {
    "checkpoint": Target(checkpoint, ("torch._weights_only_unpickler",)),
    "key": Target(key_file),
    "bundle": Target(bundle),
    "commitment": Target(commitment),
    "journal": Target(journal),
    "timestamp": Target(time_stamp),
    "onnx": Target(onnx_file),
    "image": Target(image, ("PIL",)),
    "server": Target(server),
    "released": Target(released, ("numpy.lib.format", "numpy.lib._format_impl")),
}
