"""Received checkpoints: what is read, what is refused, and how much memory that decision takes."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.utils.archive import check_archive
from gradsigns_lightning.data import Digits
from gradsigns_lightning.models import MLP, Classifier, ResNet20, SmallResNet
from gradsigns_lightning.models.catalogue import described_network
from gradsigns_lightning.models.skeleton import skeleton
from gradsigns_lightning.runs.checkpoint import (
    _check_memory,
    describe,
    description_of,
    load_classifier,
    load_weights,
    read_checkpoint,
)
from gradsigns_lightning.runs.suspect import open_control

MODEL = {"_target_": "gradsigns_lightning.models.SmallResNet", "in_channels": 1, "n_classes": 10, "width": 4}
DATA = {"name": "digits", "n_classes": 10, "input_shape": [1, 8, 8], "mean": [0.305], "std": [0.376]}
WEIGHT = "net.blocks.0.residual.0.weight"


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(SmallResNet(1, 10, 4), 10)


def content(state=None, **changes):
    state = classifier().state_dict() if state is None else state
    return {"state_dict": state, "hyper_parameters": describe(MODEL, DATA, "00"), **changes}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.ckpt"


def load(file):
    checkpoint = read_checkpoint(str(file))
    return load_classifier(checkpoint, description_of(checkpoint, str(file)))


def with_weight(value):
    return {**classifier().state_dict(), WEIGHT: value}


def test_a_checkpoint_is_read_with_what_it_states(file):
    torch.save(content(), file)
    loaded, own = load(file), classifier()
    assert not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in own.state_dict().items())
    assert description_of(read_checkpoint(str(file)), "f")["data"] == {
        **DATA,
        "input_shape": (1, 8, 8),
        "mean": (0.305,),
        "std": (0.376,),
    }


@pytest.mark.parametrize("change", ["half", "parameters", "channels last", "int counters"])
def test_other_numbers_and_layouts_of_the_same_weights_are_read(file, change):
    state = classifier().state_dict()
    state |= {
        "half": {name: value.half() for name, value in state.items() if value.is_floating_point()},
        "parameters": {WEIGHT: torch.nn.Parameter(state[WEIGHT])},
        "channels last": {WEIGHT: state[WEIGHT].contiguous(memory_format=torch.channels_last)},
        "int counters": {name: value.int() for name, value in state.items() if name.endswith("tracked")},
    }[change]
    torch.save(content(state), file)
    weights = load(file).state_dict()
    assert weights[WEIGHT].dtype == torch.float32
    assert torch.allclose(weights[WEIGHT], state[WEIGHT].float())


def test_a_whole_checkpoint_of_lightning_gives_its_weights(file):
    trained = Classifier(MLP((1, 8, 8), 10, [8]), 10, optimizer=partial(torch.optim.Adam, lr=1e-3))
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(max_epochs=1, accelerator="cpu", **quiet)
    trainer.fit(trained, datamodule=Digits())
    trainer.save_checkpoint(file)
    other = Classifier(MLP((1, 8, 8), 10, [8]), 10)
    load_weights(other, read_checkpoint(str(file), argument="init"), argument="init")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in trained.state_dict().items())


def test_weights_are_copied_out_of_the_file(file):
    torch.save(content(), file)
    loaded = load(file)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    torch.save(content(with_weight(torch.full((4, 4, 3, 3), 7.0))), file)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


WRONG_WEIGHTS = {
    "missing": {k: v for k, v in classifier().state_dict().items() if k != WEIGHT},
    "one more": {**classifier().state_dict(), "net.foreign": torch.zeros(1)},
    "one that is no name": {**classifier().state_dict(), 7: torch.zeros(1)},
    "another shape": with_weight(torch.zeros(4, 4, 3, 5)),
    "one more side": with_weight(torch.zeros(4, 4, 3, 3, 1)),
    "no shape": with_weight(torch.tensor(0.0)),
    "integers": with_weight(torch.zeros(4, 4, 3, 3, dtype=torch.int64)),
    "truth": with_weight(torch.zeros(4, 4, 3, 3, dtype=torch.bool)),
    "text": with_weight("weights"),
    "none": with_weight(None),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_named(file, name):
    torch.save(content(WRONG_WEIGHTS[name]), file)
    with pytest.raises(ValueError, match="`checkpoint`: the weights do not fit the model"):
        load(file)
    with pytest.raises(ValueError, match="`init`: the weights do not fit the model"):
        load_weights(classifier(), read_checkpoint(str(file)), argument="init")


def test_memory_for_a_network_is_taken_only_when_its_weights_are_there(file, monkeypatch):
    torch.save(content(WRONG_WEIGHTS["missing"]), file)
    made = []
    original = torch.nn.Conv2d.reset_parameters
    monkeypatch.setattr(
        torch.nn.Conv2d,
        "reset_parameters",
        lambda self: made.append(self.weight.device.type) or original(self),
    )
    with pytest.raises(ValueError, match="do not fit"):
        load(file)
    assert set(made) == {"meta"}


@pytest.mark.parametrize(("side", "refused"), [(32, False), (2048, True)])
def test_a_network_that_keeps_gigabytes_for_one_image_is_refused_before_it_is_passed(
    file, monkeypatch, side, refused
):
    """A small file states how large the images are, and a claimant's key may agree with it."""
    model = {"_target_": "gradsigns_lightning.models.ResNet20", "in_channels": 1, "n_classes": 10}
    state = Classifier(ResNet20(1, 10), 10).state_dict()
    torch.save(
        content(state, hyper_parameters=describe(model, {**DATA, "input_shape": [1, side, side]}, "00")), file
    )
    devices = set()
    original = torch.nn.Conv2d.forward
    monkeypatch.setattr(
        torch.nn.Conv2d, "forward", lambda self, x: devices.add(x.device.type) or original(self, x)
    )
    if refused:
        with pytest.raises(
            ValueError,
            match=r"`checkpoint` describes a network that keeps \d{10} bytes for "
            r"one image",
        ):
            load(file)
    else:
        load(file)
    assert devices == {"meta"}


def vit(side, **changes):
    description = {
        "_target_": "gradsigns_lightning.models.ViT",
        "input_shape": [3, side, side],
        "n_classes": 10,
        **changes,
    }
    return skeleton(described_network(description)), (3, side, side)


@pytest.mark.parametrize(
    ("side", "changes"),
    [
        (64, {"patch_size": 1, "dim": 32, "depth": 256, "heads": 32}),  # attention
        (256, {"patch_size": 1}),
        (32, {"patch_size": 1, "dim": 2**14, "depth": 4, "heads": 1}),  # tokens
    ],
)
def test_a_transformer_that_keeps_gigabytes_for_one_image_is_refused(side, changes):
    with pytest.raises(
        ValueError,
        match=r"`checkpoint` describes a network that keeps \d{10,} bytes for one "
        r"image",
    ):
        _check_memory(*vit(side, **changes))


@pytest.mark.parametrize(
    ("side", "changes"),
    [
        (224, {"patch_size": 16, "dim": 768, "depth": 12, "heads": 12}),
        (224, {"patch_size": 16, "dim": 1024, "depth": 24, "heads": 16}),
        (32, {"patch_size": 2, "dim": 384, "depth": 12, "heads": 6}),
        (64, {}),
    ],
)
def test_transformers_of_usual_sizes_are_read(side, changes):
    _check_memory(*vit(side, **changes))


@pytest.mark.parametrize("shape", [(10**6, 10**6), (4, 4, 3, 3)])
def test_views_that_repeat_a_number_are_refused(file, shape):
    torch.save(content({f"w{i}": torch.zeros(1).expand(shape) for i in range(100)}), file)
    with pytest.raises(ValueError, match=r"`checkpoint`: '.*' describes larger tensors than it holds"):
        read_checkpoint(str(file))


def test_a_network_whose_sizes_do_not_go_together_is_named(file):
    model = {
        "_target_": "gradsigns_lightning.models.ViT",
        "input_shape": [1, 8, 8],
        "n_classes": 10,
        "patch_size": 3,
    }
    torch.save(content(hyper_parameters=describe(model, DATA, "00")), file)
    with pytest.raises(
        ValueError, match="`checkpoint` describes a network that cannot be built: `patch_size` must divide"
    ):
        load(file)


class Hiding:
    """Pickles as a dictionary with attributes that hide its methods."""

    def __init__(self, values):
        self.values = values

    def __reduce__(self):
        hiding = dict.fromkeys(("items", "keys", "get", "values", "__iter__"), OrderedDict)
        return OrderedDict, (), hiding, None, iter(self.values.items())


def test_attributes_that_hide_a_dictionarys_methods_are_not_used(file):
    torch.save(Hiding(content(Hiding(classifier().state_dict()))), file)
    assert torch.load(file, weights_only=True).get is OrderedDict
    assert load(file).net(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_versions_of_layers_are_this_releases_not_the_files(file):
    pytest.importorskip("torchvision")
    model = {"_target_": "torchvision.models.mnasnet0_5", "num_classes": 10}  # reads weights by their version
    state = Classifier(described_network(model)(), 10).state_dict()
    state._metadata["net"] = {"version": "foreign"}
    colours = {**DATA, "input_shape": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    torch.save(content(state, hyper_parameters=describe(model, colours, "00")), file)
    assert all(torch.equal(value, state[name]) for name, value in load(file).state_dict().items())


# --- the archive


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Calls(bytearray, 2**40), "bytearray"),
        (Calls(torch.FloatTensor, 10**6, 10**6), "torch FloatTensor"),
        (Calls(set, [1]), "set"),
        (b"bytes", "_codecs encode"),
        (torch.zeros(2).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.zeros(2, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (Calls(print, "x"), "print"),
    ],
)
def test_a_pickle_that_names_more_than_tensors_is_refused_unread(file, value, name, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch read the file"))
    torch.save(content(extra=value), file)
    with pytest.raises(ValueError, match=f"`checkpoint`: .*it names '.*{name}', which is not part"):
        read_checkpoint(str(file))


def entries_of(file):
    with zipfile.ZipFile(file) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def write_archive(file, entries, *, kind=zipfile.ZIP_STORED):
    """Write an archive with the end that torch writes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    data = stream.getvalue()
    length, start = struct.unpack("<II", data[-10:-2])
    end = struct.pack(
        "<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, len(entries), len(entries), length, start
    )
    file.write_bytes(
        data[:-22] + end + struct.pack("<4sIQI", b"PK\x06\x07", 0, len(data) - 22, 1) + data[-22:]
    )


def test_an_archive_that_is_written_like_torchs_is_read(file):
    torch.save(content(), file)
    write_archive(file, entries_of(file))
    check_archive(file)
    assert load(file).net(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda entries: entries, zipfile.ZIP_DEFLATED, "an entry is packed"),
        (lambda entries: [*entries, entries[0]], zipfile.ZIP_STORED, "two entries have one name"),
        (
            lambda entries: [*entries, (entries[0][0].upper(), b"")],
            zipfile.ZIP_STORED,
            "two entries have one name",
        ),
        (
            lambda entries: [*entries, ("other/data.pkl", b"")],
            zipfile.ZIP_STORED,
            "description is missing or too long",
        ),
        (lambda entries: entries[1:], zipfile.ZIP_STORED, "description is missing or too long"),
        (
            lambda entries: [(entries[0][0], bytes(2**24 + 1)), *entries[1:]],
            zipfile.ZIP_STORED,
            "description is missing or too long",
        ),
        (
            lambda entries: [(entries[0][0], b"]" * (2**20 + 5) + b"."), *entries[1:]],
            zipfile.ZIP_STORED,
            "description is too long",
        ),
        (
            lambda entries: [(entries[0][0], pickle.dumps(Calls(bytearray, 9), 4)), *entries[1:]],
            zipfile.ZIP_STORED,
            "STACK_GLOBAL",
        ),
    ],
)
def test_an_archive_that_asks_for_more_than_it_holds_is_refused(file, change, kind, message):
    torch.save(content(), file)
    write_archive(file, change(entries_of(file)), kind=kind)
    with pytest.raises(ValueError, match=message):
        check_archive(file)


def moved_directory(data):
    """Python would read the directory before the end, torch the one at the stated place."""
    return data[:-50] + bytes(8) + data[-42:]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:200],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:-2] + b"\x01\x00x",
        lambda data: b"x" + data,
        lambda data: data[:-98] + data[-22:],
        lambda data: data[:-2] + b"\x01\x00",
        lambda data: data[:-34] + bytes(8) + data[-26:],
        moved_directory,
    ],
)
def test_an_archive_whose_directory_could_be_seen_in_two_places_is_refused(file, change):
    torch.save(content(), file)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=r"it was not written by torch\.save"):
        check_archive(file)


def test_files_of_old_releases_of_torch_are_named(file):
    torch.save(content(), file, _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError,
        match=r"`init`: '.*model\.ckpt' is damaged.*not written by torch\.save \(torch 1\.6 or later\)",
    ):
        read_checkpoint(str(file), argument="init")


def test_a_control_that_is_no_checkpoint_is_called_a_control(file):
    file.write_bytes(b"words")
    key = WatermarkKey.generate("A", 32, input_shape=(1, 8, 8), target_class=0)
    with pytest.raises(ValueError, match=r"^`controls`: '.*model\.ckpt' is damaged"):
        open_control(str(file), key)


# --- the pickle


def named(name):
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def big(value):
    return b"\x8a\x08" + struct.pack("<q", value)


TWICE = b"r\0\0\0\0j\0\0\0\0"  # keep the value on top of the stack, and fetch it again
NO_HOOKS = named("collections.OrderedDict") + b")R"
STORAGE = b"(" + text("storage") + named("torch.FloatStorage") + text("0") + text("cpu") + b"K\x10tQ"


def tensor(offset=0, side=16, stride=1, storage=STORAGE, hooks=NO_HOOKS, end=b"tR"):
    place = big(offset) + big(side) + b"\x85" + big(stride) + b"\x85\x89"
    return named("torch._utils._rebuild_tensor_v2") + b"(" + storage + place + hooks + end


def parameter(value, hooks=NO_HOOKS):
    return named("torch._utils._rebuild_parameter") + value + b"\x89" + hooks + b"\x87R"


def state_of(weight):
    return b"}" + text("state_dict") + b"}" + text("w") + weight + b"ss"


def copies(function, value):
    return b"](" + value + b"r\0\0\0\0" + (named(function) + b"j\0\0\0\0\x85R") * 3 + b"e"


TUPLE_OF_17 = b"(" + b"K\x01" * 17 + b"t"
FORGED = {
    "a key that takes for ever to hash": (b"})" + (TWICE + b"\x86") * 60 + b"K\x01s", "nested too deep"),
    "a key that overflows the stack": (b"})" + b"\x85" * 600_000 + b"K\x01s", "nested too deep"),
    "a value that takes for ever to compare": (b")" + (TWICE + b"\x86") * 30, "repeated too often"),
    "a tuple as key": (b"})K\x01s", "a key of a dictionary is neither text nor a small integer, but tuple"),
    "a number as key": (b"}G" + bytes(8) + b"K\x01s", "a key of a dictionary .* float"),
    "keys of one hash": (b"}" + big(2**61 - 1) + b"K\x01s", "a key of a dictionary .* int"),
    "a list in itself": (b"]" + TWICE + b"a", "changed after it was used"),
    "a list that grows where it was used": (b"]r\0\0\0\0\x85j\0\0\0\0Na", "changed after it was used"),
    "copies of a dictionary": (copies("collections.OrderedDict", b"}"), "it calls collections OrderedDict"),
    "copies of a shape": (copies("torch.Size", TUPLE_OF_17), "it calls torch Size"),
    "counted letters": (copies("collections.Counter", text("aaaa")), "it calls collections Counter"),
    "a parameter of nothing": (parameter(b"N"), "it calls torch._utils _rebuild_parameter"),
    "a parameter with hooks": (
        parameter(tensor(), b"}K\x01K\x02s"),
        "it calls torch._utils _rebuild_parameter",
    ),
    "a tensor that is changed": (state_of(tensor() + b"}b"), "it changes a tensor"),
    "a parameter that is changed": (state_of(parameter(tensor()) + b"}b"), "it changes a tensor"),
    "a tensor with hooks": (tensor(hooks=b"}K\x01K\x02s"), "it calls torch._utils _rebuild_tensor_v2"),
    "a tensor with more": (tensor(end=b"}tR"), "it calls torch._utils _rebuild_tensor_v2"),
    "a tensor beyond its storage": (tensor(side=17), "it calls torch._utils _rebuild_tensor_v2"),
    "a tensor that begins too late": (tensor(offset=1), "it calls torch._utils _rebuild_tensor_v2"),
    "a tensor with long steps": (tensor(stride=2), "it calls torch._utils _rebuild_tensor_v2"),
    "a tensor that begins before": (tensor(offset=-1), "it calls torch._utils _rebuild_tensor_v2"),
    "a tensor without numbers": (tensor(storage=b"N"), "it calls torch._utils _rebuild_tensor_v2"),
    "something outside": (b"K\x01Q", "refers to something other than numbers"),
    "a long device": (named("torch.device") + text("cpu" * 11) + b"\x85R", "it calls torch device"),
    "an object": (named("torch.Size") + b")\x81", "its step NEWOBJ"),
    "nothing to call": (b"K\x01)R", "it calls 1 with other arguments"),
    "an empty stack": (b"\x85", "its description is damaged"),
    "a mark that is missing": (b"t", "its description is damaged"),
    "a key without a value": (b"}(K\x01u", "its description is damaged"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_pickle_is_refused_before_torch_reads_it(file, name, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch read the file"))
    pickled, message = FORGED[name]
    write_archive(file, [("a/data.pkl", b"\x80\x02" + pickled + b"."), ("a/data/0", bytes(64))])
    with pytest.raises(ValueError, match=f"`checkpoint`: .*{message}"):
        read_checkpoint(str(file))


def test_the_parts_of_the_forged_pickles_are_read_where_they_belong(file):
    pickled = b"\x80\x02" + state_of(parameter(tensor())) + b"."
    write_archive(file, [("a/data.pkl", pickled), ("a/data/0", bytes(64)), ("a/version", b"3\n")])
    assert torch.equal(read_checkpoint(str(file))["state_dict"]["w"], torch.zeros(16))


def test_what_optimizers_and_schedules_keep_is_read(file):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])  # keeps a Counter
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    extra = {
        "shape": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "expanded": torch.zeros(1).expand(9),
        "none": [None, 0.5],
    }
    torch.save(
        content(
            optimizer_states=[optimizer.state_dict()], lr_schedulers=[schedule.state_dict()], extra=extra
        ),
        file,
    )
    read = read_checkpoint(str(file))
    assert read["lr_schedulers"][0]["milestones"] == {3: 1, 5: 1}
    assert read["optimizer_states"][0]["state"][0]["step"] == 1
    assert read["extra"]["shape"] == (1, 2)


# --- entries


def write_directory(file, body, entries):
    """Write ``body`` and a directory of ``entries``, each a name, its place in ``body`` and its length."""
    directory = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, *bytes(5), size, size, len(name), *bytes(5), place)
        + name
        for name, place, size in entries
    )
    n, length, start = len(entries), len(directory), len(body)
    end = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, n, n, length, start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + length, 1)
    file.write_bytes(
        body
        + directory
        + end
        + locator
        + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, *[2**32 - 1] * 2, 0)
    )


LOCAL = b"PK\x03\x04" + bytes(26)


def test_a_directory_of_very_many_entries_is_not_read(file, monkeypatch):
    write_directory(file, LOCAL, [(b"%05x" % i, 0, 0) for i in range(50_000)])
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("the directory was read"))
    with pytest.raises(ValueError, match="it has too many entries"):
        check_archive(file)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([(b"a/data/0", 0, 64), (b"a/data/1", 0, 64)], "two entries share bytes"),
        ([(b"a/data/0", 0, 64), (b"a/data/1", 64, 16)], "two entries share bytes"),
        ([(b"a/data/0", 94, 64)], "two entries share bytes"),  # the second lies in the directory
        ([(b"a/data/0", 1, 64)], "an entry is not where it is said to be"),
        ([(b"a/data/0", 0, 64), (b"a/data/1", 94, 30)], "its description is missing"),
    ],
)
def test_entries_that_lie_over_each_other_are_refused(file, entries, message):
    write_directory(file, LOCAL + bytes(34) + LOCAL + LOCAL + bytes(34 - 4), entries)
    with pytest.raises(ValueError, match=message):
        check_archive(file)


@pytest.mark.parametrize("order", [b"big", b"little ", b"middle"])
def test_numbers_in_another_order_are_refused(file, order):
    torch.save(content(), file)
    order = {"model/byteorder": order}
    entries = [(name, order.get(name, data)) for name, data in entries_of(file)]
    assert entries != entries_of(file)
    write_archive(file, entries)
    with pytest.raises(ValueError, match="not in little-endian order"):
        check_archive(file)
