"""Hands hostile files to every reader and reports side effects: `foreign_files_worker.py FOLDER` (Linux).

test_foreign_files.py runs this program. Genuine files come first, so that all modules that readers need are
imported; then every attack runs with an audit hook on what Python does, a watch on the baits (files that only
a hostile text names, whoever opens them), wrappers around Hydra's and OmegaConf's functions, and a record of
its peak memory. At the end come acts that the watch must see: guilty acts of every kind, and readers that
compose and instantiate what a checkpoint says, as this package's once did.
"""

import contextlib
import ctypes
import encodings.cp437  # noqa: F401  (zipfile needs it for old names)
import importlib
import io
import itertools
import json
import os
import pickle
import runpy
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

os.environ |= {"FOREIGN_SECRET": "s3cr3t-81c2", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
FOLDER = Path(sys.argv[1]).resolve()
BAIT, OUT = FOLDER / "bait", FOLDER / "out"
os.environ["GRADSIGNS_DATA"] = str(FOLDER / "data")
os.chdir(FOLDER)

import hydra  # noqa: E402
import hydra.utils  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from gradsigns_lightning import WatermarkKey, strip  # noqa: E402
from gradsigns_lightning.cli import main, runner  # noqa: E402
from gradsigns_lightning.data import catalogue  # noqa: E402
from gradsigns_lightning.evidence import Bundle, Statement, check_timestamp, load_signer  # noqa: E402
from gradsigns_lightning.models import MLP, Classifier  # noqa: E402
from gradsigns_lightning.models.release_2021 import load_2021  # noqa: E402
from gradsigns_lightning.runs import checkpoint, suspect  # noqa: E402
from gradsigns_lightning.runs import config as schema  # noqa: E402
from gradsigns_lightning.runs.build import to_plain  # noqa: E402
from gradsigns_lightning.verification.api.queries import read_journal  # noqa: E402
from gradsigns_lightning.verification.api.verify import replay  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(schema.__file__).resolve().parents[2]
READABLE = (
    sys.prefix,
    sys.base_prefix,
    sys.exec_prefix,
    str(ROOT),
    str(FOLDER),
    "/proc/",
    "/sys/",
    "/dev/null",
    "/dev/urandom",
)
FORBIDDEN = (
    *(
        "subprocess.",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.fork",
        "pty.",
        "socket.",
        "ctypes.",
        "pickle.",
    ),
    *("urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.", "shutil.", "tempfile."),
    *("os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate"),
)
# allowed in the folder for results
WRITING = ("os.remove", "os.rename", "os.link", "os.chmod", "tempfile.mkstemp")
HYDRAS_OWN = {"HYDRA_FULL_ERROR"}  # set and restored by the command itself
MARK = "foreign"  # in every hostile text
READ = (0, 3)  # exit codes of a verdict


def is_result(path):
    return isinstance(path, (str, bytes)) and Path(os.fsdecode(path)).absolute().is_relative_to(OUT)


class Watch:
    """What happens while it is open."""

    def __init__(self):
        self.events, self.open = [], False
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.inotify = self.libc.inotify_init1(os.O_NONBLOCK)
        assert self.libc.inotify_add_watch(self.inotify, str(BAIT).encode(), 0x20 | 0x100) > 0  # opened, made
        sys.addaudithook(self.hear)

    def note(self, text):
        if self.open:
            self.events.append(text[:200])

    def hear(self, event, arguments):
        if not self.open:
            return
        hear = {"open": self.hear_open, "import": self.hear_import, "os.mkdir": self.hear_mkdir}.get(event)
        if hear is not None:
            hear(*arguments)
        elif event in ("os.putenv", "os.unsetenv"):
            if os.fsdecode(arguments[0]) not in HYDRAS_OWN:
                self.note(f"{event} {arguments[0]}")
        elif event == "exec":
            self.note(f"exec by {sys._getframe(2).f_globals.get('__name__')}")
        elif event.startswith(FORBIDDEN) and not (event in WRITING and is_result(arguments[0])):
            self.note(f"{event} {arguments[:1]}")

    def hear_import(self, name, *_):
        if name not in sys.modules:
            self.note(f"import {name}")

    def hear_mkdir(self, path, *_):
        made = Path(os.fsdecode(path)).resolve()
        if made != FOLDER and not made.is_relative_to(OUT):
            self.note(f"os.mkdir {path}")

    def hear_open(self, path, mode, flags):
        if isinstance(path, int):
            return
        path = str(Path(os.fsdecode(path)).absolute())
        changes = isinstance(flags, int) and flags & (
            os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        )
        if path.startswith(str(BAIT)) or not path.startswith(READABLE):
            self.note(f"open {path}")
        elif changes and not path.startswith((str(OUT), "/dev/null")):
            self.note(f"write {path}")

    def baits(self):
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(self.inotify, 1 << 16))
        return False

    @contextlib.contextmanager
    def over(self, report):
        self.events = []
        self.baits()
        before = peak(reset=True)
        self.open = True
        try:
            yield
        finally:
            self.open = False
            report["events"] = sorted({*self.events, *(["a bait was opened"] if self.baits() else [])})
            report["megabytes"] = peak() - before


def peak(*, reset=False):
    """Peak resident memory in MiB; `reset` starts again."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def wrap(watch):
    """Report calls of Hydra and OmegaConf with foreign text, and of a resolver that only such text names."""

    def wrapped(owner, name, *, always=False):
        original = getattr(owner, name)

        def call(*arguments, **named):
            if always or MARK in repr((arguments, named)):
                watch.note(f"{getattr(owner, '__name__', owner)}.{name} {arguments!r}")
            return original(*arguments, **named)

        setattr(owner, name, call)

    wrapped(hydra, "compose", always=True)
    wrapped(hydra.utils, "instantiate")
    for name in ("create", "resolve", "to_container", "from_dotlist"):
        wrapped(OmegaConf, name)
    OmegaConf.register_new_resolver("foreign", lambda *words: watch.note(f"resolved {words}") or 1)


# --- genuine files

MODEL = {
    "_target_": "gradsigns_lightning.models.MLP",
    "input_shape": [1, 8, 8],
    "n_classes": 10,
    "hidden": [8],
}
DATA = {"name": "digits", "n_classes": 10, "input_shape": [1, 8, 8], "mean": [0.305], "std": [0.376]}


PHOTOS_MODEL = {**MODEL, "input_shape": [3, 32, 32]}
PHOTOS = {"name": "cifar10", "n_classes": 10, "input_shape": [3, 32, 32]}
PHOTOS |= {"mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]}


def state(shape=(1, 8, 8)):
    torch.manual_seed(0)
    return Classifier(MLP(shape, 10, [8]), 10).state_dict()


def write_batch(folder, batch):
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    (folder / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps(batch, 3))


def content(model=MODEL, data=DATA, **changes):
    described = {"format": 1, "model": model, "data": data, "commitment": "00"}
    return {"state_dict": state(), "hyper_parameters": {"gradsigns": described}, **changes}


def prepare():
    from PIL import Image

    Image.init()  # Pillow imports all its readers when it meets none of the usual formats
    for folder in (BAIT, OUT, FOLDER / "data", FOLDER / "images", FOLDER / "images32", FOLDER / "release"):
        folder.mkdir()
    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(FOLDER / f"images/{i}.png")
        Image.new("RGB", (32, 32), (60 * i, 9, 9)).save(FOLDER / f"images32/{i}.png")
    torch.save(content(), "good.ckpt")
    assert main(["keygen", "owner=A", "data=digits", "key=b32", "target_class=3", "out=k.gskey"]) == 0
    assert main(["keygen", "owner=A", "data=digits", "key=b64", "target_class=3", "out=master.gskey"]) == 0
    assert main(["commit", "key=k.gskey", f"out={FOLDER / 'k.commitment.json'}"]) == 0
    write_onnx("good.onnx")
    torch.save(content(PHOTOS_MODEL, PHOTOS, state_dict=state((3, 32, 32))), "good32.ckpt")
    assert main(["keygen", "owner=A", "data=cifar10", "key=b32", "target_class=3", "out=k32.gskey"]) == 0
    write_batch(FOLDER / "cifar", {b"data": np.zeros((20, 3072), np.uint8), b"labels": [3] * 20})
    np.save(FOLDER / "mean.npy", np.full((3, 32, 32), 0.5, np.float32))
    words = [
        *COMMANDS["onnx"]("good.onnx"),
        "bundle=b.gsbundle",
        "commitment=k.commitment.json",
        "api.journal=j.jsonl",
    ]
    assert main(words) in READ
    (OUT / "j.jsonl").write_bytes(Path("j.jsonl").read_bytes())
    runpy.run_path(str(ROOT / "tests/unit/models/test_models_release_2021.py"))["write_release"](
        FOLDER / "release"
    )
    (BAIT / "evil.yaml").write_text(
        "name: foreign\nmodule:\n  _target_: torch.load\n  f: bait/run.pkl\n  weights_only: false\n"
    )
    (BAIT / "run.pkl").write_bytes(pickle.dumps(Runs()))
    (BAIT / "weights.bin").write_bytes(bytes(10**5))


class Runs:
    def __reduce__(self):
        return os.system, ("touch bait/ran-foreign",)


def write_onnx(path, change=lambda model: None):
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["y"])]
    sides = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
        for n, s in (("x", ["n", 1, 8, 8]), ("y", ["n", 10]))
    ]
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(64, 10)).astype("f4"), "w")
    graph = helper.make_graph(nodes, "net", sides[:1], sides[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    change(model)
    Path(path).write_bytes(model.SerializeToString())


# --- hostile files

ENV = "${foreign:}${oc.env:FOREIGN_SECRET}"
UP = os.path.relpath(BAIT / "evil", Path(schema.config_folder()) / "data")
NAMES = [
    *(
        UP,
        str(BAIT / "evil"),
        f"../{UP}",
        "foreign",
        "data@foreign",
        "digits@data",
        "digits,foreign",
        "digits +foreign=1",
    ),
    *(
        "digits\nforeign",
        "[digits,foreign]",
        ENV,
        "'digits",
        "null",
        "???",
        "image_folder",
        "ytf",
        "cifar10",
        "x" * 150,
    ),
    *("x" * 10**6, 5, None, ["digits"], {"_target_": "foreign"}, True, "\x1b[2Jforeign"),
]
TARGETS = [
    *(
        "torch.load",
        "torch.hub.load",
        "torch.utils.cpp_extension.load_inline",
        "torch.package.PackageImporter",
        "os.system",
    ),
    *(
        "subprocess.check_output",
        "builtins.eval",
        "gradsigns_lightning.cli.main",
        "lightning.pytorch.Trainer",
        "foreign.Net",
    ),
    *(
        "gradsigns_lightning.models.Classifier",
        "gradsigns_lightning.models.mlp.MLP",
        "torchvision.models.get_model",
    ),
    *(
        "torchvision.models.detection.ssd300_vgg16",
        ENV,
        "",
        ".",
        "gradsigns_lightning.models.",
        "x" * 10**6,
        None,
        7,
        ["torch.load"],
    ),
]
RESNET = {"_target_": "torchvision.models.resnet18", "num_classes": 10}
NESTED = {"_target_": "torch.load", "f": "bait/run.pkl", "weights_only": False}


def model(**changes):
    return content({**MODEL, **changes})


def without(name, **changes):
    return content({k: v for k, v in {**MODEL, **changes}.items() if k != name})


def swollen(levels=40):
    nested = ["foreign"]
    for _ in range(levels):
        nested = [nested, nested]
    return nested


def of_size(make):
    """A file whose own weights are all views of one number."""
    state = torch.nn.Module.state_dict(make())
    return {name: torch.zeros(1, dtype=value.dtype).expand(value.shape) for name, value in state.items()}


def huge():
    with torch.device("meta"):
        return Classifier(MLP((1, 8, 8), 10, [10**6, 10**6]), 10)


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


DESCRIPTIONS = {
    **{f"target {target!r:.40}": model(_target_=target, f="bait/run.pkl") for target in TARGETS},
    **{
        f"nested in {name}": model(**{name: NESTED})
        for name in ("input_shape", "n_classes", "hidden", "foreign")
    },
    **{f"${{...}} in {name}": model(**{name: ENV}) for name in ("input_shape", "n_classes", "hidden")},
    **{
        f"{name}": model(**{name: value})
        for name, value in {"_partial_": True, "_args_": [ENV], "_convert_": "all"}.items()
    },
    "only nested": content(
        {"_target_": "gradsigns_lightning.models.Classifier", "net": NESTED, "n_classes": 10}
    ),
    "weights": content({**RESNET, "weights": "DEFAULT"}),
    "norm layer": content({**RESNET, "norm_layer": NESTED}),
    "name of torchvision": content(
        {"_target_": "gradsigns_lightning.models.torchvision_model", "name": ENV, "n_classes": 10}
    ),
    "names of torchvision": content({"_target_": "torchvision.models.../foreign", "num_classes": 10}),
    "classes of 10^9": model(n_classes=10**9),
    "classes of 10^5000": model(n_classes=10**5000),
    "hidden 10^9": model(hidden=[10**9]),
    "hidden 10^6, of small weights": model(hidden=[10**6, 10**6]),
    "hidden 10^6, of one number": content({**MODEL, "hidden": [10**6, 10**6]}, state_dict=of_size(huge)),
    "a million layers": model(hidden=[8] * 10**5),
    "deep transformer": content(
        {
            "_target_": "gradsigns_lightning.models.ViT",
            "input_shape": [1, 8, 8],
            "n_classes": 10,
            "depth": 10**9,
        }
    ),
    "swollen": model(hidden=swollen()),
    "tensor": model(hidden=torch.zeros(3)),
    "no target": without("_target_"),
    "no shape": without("input_shape"),
    "a list": content([MODEL]),
    "text": content(ENV),
}
DATAS = {
    **{f"data {name!r:.40}": content(data={**DATA, "name": name}) for name in NAMES},
    **{
        f"data with {name} {value!r:.30}": content(data={**DATA, name: value})
        for name, values in {
            "mean": ([ENV], [float("nan")], [True], [10**400], [0.305, 0.3], None),
            "std": ([0.0], [-1.0], [float("inf")], NESTED),
            "n_classes": (10**9, True, ENV, 1),
            "input_shape": ([1, 8, 10**9], ENV, [1, 8], [3, 8, 8]),
        }.items()
        for value in values
    },
    "data of nothing": content(data=None),
    "data swollen": content(data={**DATA, "mean": swollen()}),
}
FILES = {
    "no dictionary": ["foreign"],
    "no description": content(hyper_parameters={}),
    "description of text": content(hyper_parameters=ENV),
    "later format": content(hyper_parameters={"gradsigns": {"format": ENV}}),
    "code": Runs(),
    "code in it": content(hyper_parameters=Runs()),
    "buffer of 8 GB": content(hyper_parameters=Calls(bytearray, 2**33)),
    "tensor of 10^12": content(hyper_parameters=Calls(torch.FloatTensor, 10**6, 10**6)),
    "sparse": content(
        state_dict={**content()["state_dict"], "net.layers.1.weight": torch.zeros(8, 64).to_sparse()}
    ),
    "meta": content(
        state_dict={**content()["state_dict"], "net.layers.1.weight": torch.zeros(8, 64, device="meta")}
    ),
    "complex": content(
        state_dict={
            **content()["state_dict"],
            "net.layers.1.weight": torch.zeros(8, 64, dtype=torch.complex64),
        }
    ),
    "text as weight": content(state_dict={**content()["state_dict"], "net.layers.1.weight": ENV}),
    "another weight": content(state_dict={**content()["state_dict"], ENV: torch.zeros(1)}),
    "weights of text": content(state_dict=ENV),
}


def packed(path):
    """A file that torch reads, whose entry of 256 MiB zeros is packed."""
    torch.save(content(), path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, bytes(2**28) if name.endswith("data/0") else data)
    data = stream.getvalue()
    length, start, _ = struct.unpack("<IIH", data[-10:])
    end = struct.pack(
        "<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, len(entries), len(entries), length, start
    )
    end += struct.pack("<4sIQI", b"PK\x06\x07", 0, len(data) - 22, 1) + data[-22:]
    Path(path).write_bytes(data[:-22] + end)


def external(location):
    def change(file):
        tensor = file.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = 1
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", location

    return change


def in_subgraph(file):
    node = (
        file.graph.node.add(op_type="If", input=["x"], output=["z"])
        .attribute.add(name="then_branch", type=5)
        .g.node.add()
    )
    tensor = node.attribute.add(name="value", type=4).t
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "bait/weights.bin"


ONNX = {
    "beside": external("bait/weights.bin"),
    "absolute": external(str(BAIT / "weights.bin")),
    "in a subgraph": in_subgraph,
    "unknown domain": lambda file: file.graph.node.add(
        op_type="Foreign", domain="foreign", input=["x"], output=["z"]
    ),
    "library": lambda file: file.graph.node.add(
        op_type="PyOp", domain="pyopmulti_1", input=["x"], output=["z"]
    ),
    "context": lambda file: file.graph.node.add(op_type="EPContext", domain="com.microsoft", output=["z"]),
    "no image": lambda file: file.graph.input[0].type.tensor_type.shape.dim.pop(),
}


IMAGES = {
    "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(bait/foreign) run\n%%EOF\n",
    "bomb": b"P5 60000 60000 255\n",
    "large": b"P5 12000 12000 255\n",
    "pickle": pickle.dumps(os.system),
}


def with_array(name, array):
    return lambda folder: np.save(folder / name, array, allow_pickle=True)


def with_header(folder):
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({10**12},), }}".ljust(117).encode() + b"\n"
    (folder / "wm.npy").write_bytes(
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)
    )


def with_weight(make):
    def change(folder):
        import h5py

        with h5py.File(folder / "model.hdf5", "a") as file:
            del file["model_weights/dense_1/dense_1/kernel:0"]
            make(h5py, file, "model_weights/dense_1/dense_1/kernel:0")

    return change


RELEASES = {
    "code": with_array("wm.npy", np.array([Runs()], dtype=object)),
    "long header": with_header,
    "external link": with_weight(
        lambda h5py, file, name: file.__setitem__(name, h5py.ExternalLink("../bait/weights.bin", "/x"))
    ),
    "external data": with_weight(
        lambda h5py, file, name: file.create_dataset(
            name, (64, 10), "f4", external=[(str(BAIT / "weights.bin"), 0, 2560)]
        )
    ),
    "huge": with_weight(lambda h5py, file, name: file.create_dataset(name, (10**6, 10**6), "f4")),
}

OTHERS = {
    "pickle": pickle.dumps(os.system),
    "text": ENV.encode(),
    "path": b"bait/evil.yaml",
    "long header": (2**40).to_bytes(8, "little") + b"{}",
    "another encoding": '{"format": "foreign"}'.encode("utf-32-be"),
    "nested": b"[" * 10**6,
    "nested header": (10**5).to_bytes(8, "little") + b"[" * 10**5,
    "key of nothing": b"-----BEGIN PRIVATE KEY-----\nZm9yZWlnbg==\n-----END PRIVATE KEY-----",
    "sequence of gigabytes": b"\x30\x84\x7f\xff\xff\xff\x02\x01\x00",
}
BATCHES = {
    "code": Runs(),
    "code in it": {b"data": Runs(), b"labels": [3] * 20},
    "of gigabytes": {b"data": Calls(bytearray, 2**33), b"labels": [3] * 20},
    "named": {b"data": os.system, b"labels": [3] * 20},
}
COUNT = itertools.count()


def new(suffix):
    return f"{OUT}/{next(COUNT)}{suffix}"


COMMANDS = {
    "verify": lambda file: ["verify", f"checkpoint={file}", "key=k.gskey"],
    "trace": lambda file: ["trace", f"checkpoint={file}", "key=master.gskey", "n_customers=10"],
    "judge": lambda file: ["judge", "bundle=b.gsbundle", f"checkpoint={file}", "images=images"],
    "control": lambda file: [
        "judge",
        "bundle=b.gsbundle",
        "checkpoint=good.ckpt",
        f"controls=[{file}]",
        "images=images",
    ],
    "init": lambda file: [
        *(
            "train",
            "data=digits",
            "model=mlp",
            "model.hidden=[8]",
            f"init={file}",
            f"hydra.run.dir={OUT}/train",
            "logger=none",
        ),
        *("trainer.accelerator=cpu", "progress=false", "trainer.max_epochs=1", "key=k.gskey"),
    ],
    "onnx": lambda file: ["verify", f"onnx={file}", "key=k.gskey", "images=images", "api.max_queries=8"],
    "onnx control": lambda file: [*COMMANDS["control"](file), "api.max_queries=8"],
    "images": lambda folder: ["verify", "checkpoint=good.ckpt", "key=k.gskey", f"images={folder}"],
    "import-2021": lambda folder: ["import-2021", f"folder={folder}", "images=images32", "api.max_queries=8"],
    "imported images": lambda folder: [
        "import-2021",
        "folder=release",
        f"images={folder}",
        "api.max_queries=8",
    ],
    "imported mean": lambda file: [*COMMANDS["import-2021"]("release"), f"mean_image={file}"],
    "strip": lambda file: ["strip", f"checkpoint={file}", f"out={OUT}/stripped.ckpt", "overwrite=true"],
    "data": lambda folder: ["verify", "checkpoint=good32.ckpt", "key=k32.gskey", f"paths.data={folder}"],
    "key": lambda file: ["verify", "checkpoint=good.ckpt", f"key={file}"],
    "master": lambda file: ["trace", "checkpoint=good.ckpt", f"key={file}", "n_customers=10"],
    "committed": lambda file: ["commit", f"key={file}", f"out={new('.commitment.json')}"],
    "copied": lambda file: ["keygen", f"master={file}", "customer=3", f"out={new('.gskey')}"],
    "trained": lambda file: [*COMMANDS["init"]("good.ckpt")[:-1], f"key={file}"],
    "bundle": lambda file: ["judge", f"bundle={file}"],
    "commitment": lambda file: [
        *COMMANDS["verify"]("good.ckpt"),
        f"bundle={new('.gsbundle')}",
        f"commitment={file}",
    ],
    "journal": lambda file: [*COMMANDS["onnx"]("good.onnx"), f"api.journal={file}"],
    "signer": lambda file: ["commit", "key=k.gskey", f"out={new('.commitment.json')}", f"signer={file}"],
    "reply": lambda file: [
        *("commit", "key=k.gskey", f"attach={file}", "authority=k.commitment.pem"),
        "out=k.commitment.json",
    ],
    "authority": lambda file: [
        *("commit", "key=k.gskey", "attach=k.commitment.json", f"authority={file}"),
        "out=k.commitment.json",
    ],
}
GENUINE = {
    **{
        "onnx": "good.onnx",
        "onnx control": "good.onnx",
        "images": "images",
        "import-2021": "release",
        "data": "cifar",
    },
    **{
        "imported images": "images32",
        "imported mean": "mean.npy",
        "key": "k.gskey",
        "master": "master.gskey",
    },
    **{"committed": "k.gskey", "copied": "master.gskey", "trained": "k.gskey", "bundle": "b.gsbundle"},
    **{"commitment": "k.commitment.json", "journal": "out/j.jsonl", "signer": "k.commitment.pem"},
}
# Other readers of a single file. The commands of the second line write a new file each time, so they run as a
# whole, on fewer files.
OF_ONE_FILE = ("imported mean", "key", "master", "committed", "trained", "bundle", "journal")
WHOLLY = ("copied", "commitment", "signer", "reply", "authority")
BRIEFLY = ("pickle", "nested", "key of nothing", "sequence of gigabytes")
# Which file the other commands get: one of each kind, since all go through the same reader.
EVERYWHERE = {
    "target 'torch.hub.load'",
    "${...} in n_classes",
    "weights",
    "hidden 10^6, of one number",
    f"data {NAMES[0]!r:.40}",
    "code",
}
WHOLE = {
    "${...} in n_classes",
    f"data {NAMES[0]!r:.40}",
    "code",
    "beside",
    "program",
    "external link",
    "another weight",
}
# The setting that names the file, if it is not `checkpoint`.
ARGUMENTS = {
    **{"control": "controls", "init": "init", "onnx": "onnx", "onnx control": "controls", "images": "images"},
    **{
        "import-2021": "folder",
        "imported images": "images",
        "imported mean": "mean_image",
        "data": "paths.data",
    },
    **{
        "key": "key.path",
        "master": "key.path",
        "committed": "key.path",
        "trained": "key.path",
        "bundle": "bundle",
    },
    **{"journal": "api.journal"},
}
STRIPPED = {
    *(
        "no dictionary",
        "code",
        "code in it",
        "buffer of 8 GB",
        "tensor of 10^12",
        "sparse",
        "meta",
        "complex",
    ),
    "packed",
}
STRIPPED |= {"swollen", "data swollen"}  # from the others it removes the description, and keeps the weights
# `init` takes weights alone, whatever the description says.
WEIGHTS_ONLY = {
    "code",
    "hidden 10^6, of one number",
    "buffer of 8 GB",
    "text as weight",
    "another weight",
    "sparse",
    "packed",
}


def attacks():
    """Yield (reader, name of the attack, file)."""
    folder = FOLDER / "attacks"
    folder.mkdir()
    everything = {**DESCRIPTIONS, **DATAS, **FILES, "packed": None}
    for i, (name, written) in enumerate(everything.items()):
        path = folder / f"{i}.ckpt"
        packed(path) if name == "packed" else torch.save(written, path)
        yield "verify", name, path
        for reader in ("trace", "judge", "control") if name in EVERYWHERE else ():
            if reader == "trace" or name not in DATAS:  # a judge brings images
                yield reader, name, path
        if name in WEIGHTS_ONLY:
            yield "init", name, path
        if name in STRIPPED:
            yield "strip", name, path
    for name, change in ONNX.items():
        path = folder / f"{name.replace(' ', '_')}.onnx"
        write_onnx(path, change)
        yield "onnx", name, path
    yield "onnx control", "beside", folder / "beside.onnx"
    (folder / "net.ort").write_bytes(b"\x18\x00\x00\x00ORTM" + bytes(100))
    yield "onnx", "of the runtime", folder / "net.ort"
    for name, data in IMAGES.items():
        path = folder / f"images_{name}"
        path.mkdir()
        (path / "image.png").write_bytes(data)
        yield "images", name, path
        yield "imported images", name, path
    for name, change in RELEASES.items():
        path = folder / f"release_{name.replace(' ', '_')}"
        path.mkdir()
        for file in (FOLDER / "release").iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        change(path)
        yield "import-2021", name, path


def other_attacks():
    """Yield the same for files that are not models, and for data sets."""
    for name, batch in BATCHES.items():
        path = FOLDER / "attacks" / f"batch_{name.replace(' ', '_')}"
        write_batch(path, batch)
        yield "data", name, path
    for reader, names in [
        *((reader, OTHERS) for reader in OF_ONE_FILE),
        *((reader, BRIEFLY) for reader in WHOLLY),
    ]:
        for name in names:
            path = OUT / f"{reader}_{name}".replace(" ", "_")
            path.write_bytes(OTHERS[name] + b"\n")
            yield reader, name, path


def run(watch, words):
    return reported(watch, lambda: main(words))


def reported(watch, command):
    report = {}
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), watch.over(report):
        report["code"] = command()
    return {**report, "out": out.getvalue(), "err": err.getvalue()}


def attack(watch, reader, name, file):
    """Run a whole command, or, to save time, only its function on settings that were composed before."""
    if name in WHOLE or reader in WHOLLY:
        return run(watch, COMMANDS[reader](file))
    module, settings = COMPOSED[reader]
    argument = ARGUMENTS.get(reader, "checkpoint")

    def command():
        try:
            command_of(module)(
                replaced(settings, argument.split("."), [str(file)] if argument == "controls" else str(file))
            )
        except Exception as error:
            return runner._report(*runner.explain(module.__name__.rpartition(".")[2], [], error))
        return 0

    return reported(watch, command)


def command_of(module):
    """Return the function that runs a command on plain settings."""
    # `run` of training takes what Hydra composed, and resolves it first
    return getattr(module, "_run", module.run)


def composed(watch, reader, file):
    """Run a command on a genuine file; return its module and its settings."""
    words = COMMANDS[reader](file)
    module = importlib.import_module(f"gradsigns_lightning.cli.{words[0].replace('-', '_')}")
    kept, original = [], module.run
    module.run = lambda config: kept.append(to_plain(config)) or original(config)
    try:
        run(watch, words)
    finally:
        module.run = original
    return module, kept[0]


# --- functions that read

HOSTILE = [
    ENV,
    UP,
    str(BAIT / "evil.yaml"),
    "bait/evil.yaml",
    "file:///bait/foreign",
    "x" * 10**5,
    10**400,
    -1,
    True,
    None,
    [],
    {},
]


def leaves(value, path=()):
    if isinstance(value, dict) and value:
        for name in value:
            yield from leaves(value[name], (*path, name))
    elif isinstance(value, list) and value:
        yield from leaves(value[0], (*path, 0))
    else:
        yield path


def replaced(value, path, new):
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    return copied


def dumped(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def edits(data):
    content = json.loads(data)
    for path in leaves(content):
        for value in HOSTILE:
            yield replaced(content, path, value)


def bundles():
    signer = load_signer(Path("k.commitment.pem").read_bytes())
    for edited in edits(Path("b.gsbundle").read_bytes()):
        if isinstance(edited.get("evidence"), dict):
            edited = {**edited, "signature": signer.sign(dumped(edited["evidence"])).hex()}
        yield dumped(edited) + b"\n"


def key_files():
    data = Path("k.gskey").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    texts = [{**header, "__metadata__": edited} for edited in edits(dumped(header["__metadata__"]))]
    public = json.loads(header["__metadata__"]["key"])
    texts += [
        {**header, "__metadata__": {**header["__metadata__"], "key": json.dumps(edited)}}
        for edited in edits(dumped(public))
    ]
    for text in texts:
        written = dumped(text)
        yield len(written).to_bytes(8, "little") + written + data[8 + length :]


def from_file(read):
    def reading(data):
        Path("out/file").write_bytes(data)
        read("out/file")

    return reading


def tried(read):
    def reading(data):
        with contextlib.suppress(ValueError):
            read(data)

    return reading


def journals():
    lines = Path("j.jsonl").read_bytes().splitlines()
    for i, line in enumerate(lines[:3]):
        for edited in edits(line):
            yield b"".join(entry + b"\n" for entry in (*lines[:i], dumped(edited), *lines[i + 1 :]))


def replay_file(data):
    Path("out/file").write_bytes(data)
    genuine = Bundle.load("b.gsbundle")
    replay(genuine.key, genuine.images, read_journal("out/file"))


def walked():
    """Which settings of which commands are handed hostile files."""
    words = {reader: command("WALKED") for reader, command in COMMANDS.items()}
    return sorted(
        {
            (all_words[0], word.partition("=")[0])
            for all_words in words.values()
            for word in all_words
            if "WALKED" in word
        }
    )


FUNCTIONS = {
    "Bundle.from_bytes": (Bundle.from_bytes, bundles),
    "Statement.from_bytes": (
        Statement.from_bytes,
        lambda: map(dumped, edits(Path("k.commitment.json").read_bytes())),
    ),
    "WatermarkKey.load": (from_file(WatermarkKey.load), key_files),
    "read_journal and replay": (replay_file, journals),
    "pickles": (
        lambda data: [
            read(data)
            for read in (
                tried(Bundle.from_bytes),
                tried(Statement.from_bytes),
                from_file(tried(read_journal)),
            )
        ],
        lambda: [pickle.dumps(Runs()), pickle.dumps(Runs(), 0)],
    ),
    "strip": (
        lambda file: strip(file, OUT / "stripped.ckpt", overwrite=True),
        lambda: sorted(Path("attacks").glob("*.ckpt")),
    ),
    "check_timestamp": (
        lambda data: check_timestamp(data, STATEMENT, data),
        lambda: [*OTHERS.values(), *(a + b for a in OTHERS.values() for b in OTHERS.values())],
    ),
    "load_2021": (load_2021, lambda: [FOLDER / "release"]),
}


def call(watch, function, inputs):
    report = {"unclean": []}
    inputs = list(inputs())
    with watch.over(report):
        for data in inputs:
            try:
                function(data)
            except ValueError:
                continue
            except Exception as error:
                report["unclean"].append(repr(error)[:200])
    return {**report, "inputs": len(inputs)}


# --- what the watch must see

GUILTY = {
    "read": (BAIT / "evil.yaml").read_text,
    "read elsewhere": Path("/etc/hostname").read_text,
    "read unseen by Python": lambda: WATCH.libc.close(WATCH.libc.open(str(BAIT / "evil.yaml").encode(), 0)),
    "write": lambda: (FOLDER / "written").write_text("x"),
    "import": lambda: __import__("foreign_module"),
    "exec": lambda: exec("1"),
    "process": lambda: subprocess.run(["true"], check=True),
    "system": lambda: os.system("true"),
    "network": lambda: __import__("socket").socket().close(),
    "library": lambda: ctypes.CDLL(None),
    "pickle": lambda: pickle.loads(pickle.dumps(Path)),
    "environment": lambda: os.putenv("FOREIGN", "1"),
    "instantiate": lambda: hydra.utils.instantiate({"_target_": "builtins.dict", "a": "foreign"}),
    "compose": lambda: hydra.compose("verify"),
    "resolve": lambda: OmegaConf.to_container(OmegaConf.create({"a": "${foreign:}"}), resolve=True),
    "memory": lambda: bytearray(2**29),
}


def act(watch, guilty):
    report = {}
    with watch.over(report), contextlib.suppress(Exception):
        guilty()
    return report


BEFORE = {"nested in hidden", "${...} in n_classes", f"data {NAMES[0]!r:.40}"}


def as_before():
    """Let checkpoints be read as by the release before: their texts are composed and instantiated."""
    from hydra.core.hydra_config import HydraConfig

    def data(name, root):
        config = hydra.compose("verify", overrides=[*HydraConfig.get().overrides.task, f"data={name}"])
        return suspect.build(to_plain(config.data)["module"])

    checkpoint.described_network = lambda described: lambda: suspect.build(described)
    checkpoint._fitting = lambda state, expected, *, argument: type("State", (dict,), {})(state)
    catalogue.shipped_data = data


if __name__ == "__main__":
    prepare()
    STATEMENT = Statement.from_bytes(Path("k.commitment.json").read_bytes())
    WATCH = Watch()
    COMPOSED = {r: composed(WATCH, r, GENUINE.get(r, "good.ckpt")) for r in COMMANDS if r not in WHOLLY}
    wrap(WATCH)
    warm_errors = [run(WATCH, COMMANDS["verify"](file)) for file in ("nowhere.ckpt", "k.gskey")]
    # whose tests are in test_timestamp.py
    has_genuine = [reader for reader in COMMANDS if reader not in ("reply", "authority")]
    result = {
        "genuine": {r: run(WATCH, COMMANDS[r](GENUINE.get(r, "good.ckpt"))) for r in has_genuine},
        "walked": walked(),
    }
    tried_files = [*attacks(), *other_attacks()]
    result["attacks"] = [{"reader": r, "name": n, **attack(WATCH, r, n, f)} for r, n, f in tried_files]
    result["functions"] = {name: call(WATCH, *parts) for name, parts in FUNCTIONS.items()}
    result["guilty"] = {name: act(WATCH, guilty) for name, guilty in GUILTY.items()}
    as_before()
    result["before"] = {
        n: run(WATCH, COMMANDS[r](f)) for r, n, f in tried_files if r == "verify" and n in BEFORE
    }
    (FOLDER / "report.json").write_text(json.dumps(result))
