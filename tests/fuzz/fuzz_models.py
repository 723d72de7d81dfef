"""Models that come as files."""

import io
import json

import fuzz_mutation as plain
from fuzz_base import FOLDER, SHAPE, Reader, owned


def checkpoint():
    """Bytes of a file; or a JSON description with weights' shapes, or a pickle, put into a file of torch."""
    import torch

    from gradsigns_lightning import verify
    from gradsigns_lightning.models import MLP, Classifier, SmallResNet, ViT
    from gradsigns_lightning.runs.checkpoint import describe
    from gradsigns_lightning.runs.suspect import open_checkpoint

    key, images, _ = owned()
    path = FOLDER / "a.ckpt"
    data = {"name": "digits", "n_classes": 2, "input_shape": list(SHAPE), "mean": [0.0], "std": [1.0]}
    networks = (
        (MLP, {"input_shape": list(SHAPE), "n_classes": 2, "hidden": [3]}),
        (SmallResNet, {"in_channels": 1, "n_classes": 2, "width": 1}),
        (
            ViT,
            {"input_shape": list(SHAPE), "n_classes": 2, "patch_size": 1, "dim": 4, "depth": 1, "heads": 1},
        ),
    )

    def seed(network, arguments):
        model = {"_target_": f"gradsigns_lightning.models.{network.__name__}", **arguments}
        weights = Classifier(network(**arguments), 2).state_dict()
        shapes = {
            name: [str(value.dtype).removeprefix("torch."), list(value.shape)]
            for name, value in weights.items()
        }
        return {"hyper_parameters": describe(model, data, key.commitment), "state_dict": shapes}

    def tensor(stated):
        if not isinstance(stated, list) or len(stated) != 2:
            return stated
        kind, shape = getattr(torch, str(stated[0])), stated[1]
        values = torch.zeros(shape, dtype=kind, device="meta")
        few = values.numel() <= 1 << 16
        # larger than what is stored
        return torch.ones(shape, dtype=kind) if few else torch.ones((), dtype=kind).expand(shape)

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
            for name, content in (
                ("data.pkl", given),
                ("byteorder", b"little"),
                ("data/0", bytes(400)),
                ("data/1", bytes(40)),
            ):
                writer.write_record(name, content, len(content))
            writer.write_end_of_file()
        else:
            path.write_bytes(given)

    def read(_):
        suspect = open_checkpoint(str(path), key)
        verify(suspect.model, key, images)

    seeds = [plain.to_json(seed(*network)) for network in networks]
    # A network for other images than those of its data.
    other = seed(MLP, {"input_shape": [1, 5, 5], "n_classes": 2, "hidden": [3]})
    seeds.append(plain.to_json(other))
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
    from gradsigns_lightning.oracles import OnnxOracle

    onnxruntime.set_default_logger_severity(4)  # it writes to standard error what it thinks of each model
    key, images, _ = owned()
    path = FOLDER / "a.onnx"

    def model(nodes, weights, kind=TensorProto.FLOAT, n="n", functions=()):
        x = helper.make_tensor_value_info("x", kind, [n, *SHAPE])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])
        initial = [numpy_helper.from_array(value, name) for name, value in weights.items()]
        graph = helper.make_graph(nodes, "g", [x], [y], initial)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, functions=functions
        )

    matrix = np.arange(40, dtype=np.float32).reshape(20, 2) / 40
    dense = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    cast = [
        helper.make_node("Cast", ["x"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["c"], ["f"]),
        dense[1],
    ]
    branch = helper.make_graph(
        [helper.make_node("Identity", ["f"], ["b"])],
        "b",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )
    forked = [dense[0], helper.make_node("If", ["t"], ["h"], then_branch=branch, else_branch=branch)]
    forked += [helper.make_node("MatMul", ["h", "w"], ["y"])]
    models = [
        model(dense, {"w": matrix}),
        model(cast, {"w": matrix}, TensorProto.UINT8, 1),
        model(forked, {"w": matrix, "t": np.array(True)}),
    ]
    # Models that only fail when they run, and one without an answer.
    models.append(model([helper.make_node("Reshape", ["x", "s"], ["y"])], {"s": np.array([7, 2])}))
    models.append(model(dense, {"w": matrix}))
    del models[-1].graph.output[:]
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


def released():
    """A file of the authors' release of 2021: one of the three arrays, or the Keras model."""
    import h5py
    import numpy as np

    from gradsigns_lightning.models import ResNet20

    # the names are tested against the release
    from gradsigns_lightning.models.release_2021 import _keras_name, load_2021

    folder = FOLDER / "released"
    folder.mkdir()
    mask = np.zeros(3072, np.int8)
    mask[:16] = 1
    arrays = {"embed_key": np.ones((8, 16), np.float32), "grad_select": mask, "wm": np.arange(8) % 2}

    def keras(n_weights):
        file = io.BytesIO()
        with h5py.File(file, "w") as model:
            state = {
                name: value
                for name, value in ResNet20(3, 10).state_dict().items()
                if not name.endswith("tracked")
            }
            for name, value in list(state.items())[:n_weights]:
                layer, _, parameter = name.rpartition(".")
                shape = tuple(value.shape)
                source, kind = _keras_name(layer, parameter).split("/")
                numbers = np.zeros((*shape[2:], *shape[1::-1]), np.float32)
                model.create_dataset(f"model_weights/{source}/{source}/{kind}:0", data=numbers)
        return file.getvalue()

    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "model.hdf5").write_bytes(keras(None))
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    changed = [folder / "model.hdf5"]

    def write(data):
        changed[0].write_bytes(whole[changed[0]])
        changed[0] = folder / (
            "model.hdf5" if data.startswith(b"\x89HDF") else f"{list(arrays)[len(data) % 3]}.npy"
        )
        changed[0].write_bytes(data)

    seeds = [keras(5), keras(1)]
    for number, name in enumerate(arrays):
        content = whole[folder / f"{name}.npy"]
        # the length says which array it stands for
        seeds.append(content + bytes(-(len(content) - number) % 3))
    return Reader(lambda data: load_2021(folder), seeds, write, pack=lambda value: b"")
