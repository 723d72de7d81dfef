"""What a checkpoint may describe, and what it may not."""

from __future__ import annotations

import inspect
import re
import time
from importlib.resources import files

import pytest
import torch
import yaml
from torch import nn

import gradsigns_lightning.models
from gradsigns_lightning.models import MLP, Classifier, ResNet20, SmallResNet, ViT
from gradsigns_lightning.models.catalogue import described_network
from gradsigns_lightning.models.foreign import shown
from gradsigns_lightning.models.skeleton import skeleton

OURS = "gradsigns_lightning.models"
ENV = "${oc.env:HOME}"
KNOWN = {
    "mlp": ({"_target_": f"{OURS}.MLP", "input_shape": [1, 8, 8], "n_classes": 10, "hidden": [16, 8]}, MLP),
    "linear": ({"_target_": f"{OURS}.MLP", "input_shape": (1, 8, 8), "n_classes": 10, "hidden": []}, MLP),
    "resnet20": (
        {"_target_": f"{OURS}.ResNet20", "in_channels": 3, "n_classes": 10, "bn_momentum": 0.1},
        ResNet20,
    ),
    "resnet20 bare": ({"_target_": f"{OURS}.ResNet20"}, ResNet20),
    "small": (
        {"_target_": f"{OURS}.SmallResNet", "in_channels": 1, "n_classes": 10, "width": 4, "stem_stride": 2},
        SmallResNet,
    ),
    "vit": (
        {
            "_target_": f"{OURS}.ViT",
            "input_shape": [1, 8, 8],
            "n_classes": 10,
            "patch_size": 4,
            "dim": 8,
            "depth": 2,
            "heads": 2,
        },
        ViT,
    ),
}
VISION = {
    "ours": {
        "_target_": f"{OURS}.torchvision_model",
        "name": "mobilenet_v3_small",
        "in_channels": 1,
        "n_classes": 10,
    },
    "theirs": {"_target_": "torchvision.models.resnet18", "num_classes": 10, "weights": None},
    "bare": {"_target_": "torchvision.models.squeezenet1_1"},
}


@pytest.mark.parametrize("name", ["mlp", "resnet20", "small_resnet", "vit"])
def test_a_networks_defaults_are_those_of_its_configuration(name):
    configured = yaml.safe_load((files("gradsigns_lightning.conf") / "model" / f"{name}.yaml").read_text())
    parameters = inspect.signature(
        getattr(gradsigns_lightning.models, configured.pop("_target_").rpartition(".")[2])
    ).parameters
    own = {option: value for option, value in configured.items() if "${" not in str(value)}
    defaults = {option: parameters[option].default for option in own}
    assert {
        option: list(value) if isinstance(value, tuple) else value for option, value in defaults.items()
    } == own


@pytest.mark.parametrize("name", KNOWN)
def test_what_train_describes_is_made(name):
    description, kind = KNOWN[name]
    network = described_network(description)()
    assert type(network) is kind
    assert {k: v.shape for k, v in skeleton(described_network(description)).state_dict().items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }


@pytest.mark.parametrize("name", VISION)
def test_classifiers_of_torchvision_are_made(name):
    pytest.importorskip("torchvision")
    network = described_network(VISION[name])()
    assert network.eval()(torch.rand(1, VISION[name].get("in_channels", 3), 64, 64)).shape == (
        1,
        1000 if name == "bare" else 10,
    )


def mlp(**changes):
    return {**KNOWN["mlp"][0], **changes}


FORBIDDEN = {
    "a function": mlp(_target_="os.getcwd"),
    "torch": mlp(_target_="torch.load"),
    "hub": {"_target_": "torch.hub.load", "repo_or_dir": "a/b", "model": "c"},
    "lightning": {"_target_": "lightning.pytorch.Trainer"},
    "the classifier": {"_target_": f"{OURS}.Classifier", "net": KNOWN["mlp"][0], "n_classes": 10},
    "through the package": mlp(_target_=f"{OURS}.mlp.MLP"),
    "a module of it": mlp(_target_=f"{OURS}.mlp.nn.Linear"),
    "a detector": {"_target_": "torchvision.models.detection.fasterrcnn_resnet50_fpn"},
    "a helper": {"_target_": "torchvision.models.get_model", "name": "resnet18"},
    "a weights class": {"_target_": "torchvision.models.ResNet18_Weights"},
    "no text": mlp(_target_=[f"{OURS}.MLP"]),
    "no target": {"input_shape": [1, 8, 8], "n_classes": 10},
    "nothing": None,
    "a list": [KNOWN["mlp"][0]],
    "partial": mlp(_partial_=True),
    "positional": mlp(_args_=[1]),
    "convert": mlp(_convert_="all"),
    "recursive": mlp(_recursive_=False),
    "another argument": mlp(device="cuda"),
    "no text as argument": {**mlp(), 3: 4},
    "missing": {"_target_": f"{OURS}.MLP", "n_classes": 10},
    "nested": mlp(hidden=[{"_target_": "os.getcwd"}]),
    "weights": {**VISION["theirs"], "weights": "DEFAULT"},
    "progress": {**VISION["theirs"], "progress": True},
    "norm_layer": {**VISION["theirs"], "norm_layer": {"_target_": "torch.nn.BatchNorm2d", "_partial_": True}},
    "weights of ours": {**VISION["ours"], "weights": "DEFAULT"},
    "name": {**VISION["ours"], "name": "../resnet18"},
    "detector by name": {**VISION["ours"], "name": "fasterrcnn_resnet50_fpn"},
    "name of a kind": {**VISION["ours"], "name": ["resnet18"]},
    "env": mlp(n_classes=ENV),
    "env target": mlp(_target_=ENV),
    "env shape": mlp(input_shape=ENV),
    "env in shape": mlp(input_shape=[1, 8, ENV]),
    "env name": {**VISION["ours"], "name": ENV},
    "bool": mlp(n_classes=True),
    "bool of momentum": {"_target_": f"{OURS}.ResNet20", "bn_momentum": True},
    "float": mlp(n_classes=10.0),
    "nan": {"_target_": f"{OURS}.ResNet20", "bn_momentum": float("nan")},
    "zero": {"_target_": f"{OURS}.ResNet20", "bn_momentum": 0.0},
    "one class": mlp(n_classes=1),
    "two sizes": mlp(input_shape=[8, 8]),
    "wide": mlp(hidden=[10**9]),
    "deep": mlp(hidden=[8] * 10**6),
    "endless": mlp(n_classes=10**5000),
    "large": mlp(input_shape=[1, 10**9, 10**9]),
    "channels": mlp(input_shape=[2**14, 8, 8]),
    "deep transformer": {**KNOWN["vit"][0], "depth": 10**9},
    "tensor": mlp(n_classes=torch.tensor(10)),
    "long": mlp(n_classes="x" * 10**6),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_everything_else_is_refused_in_few_words(name, monkeypatch):
    monkeypatch.setenv("HOME", "the-secret")
    with pytest.raises(ValueError, match="`checkpoint`") as error:
        described_network(FORBIDDEN[name])
    assert len(str(error.value)) < 500
    assert "the-secret" not in str(error.value)


def test_attributes_that_hide_a_dictionarys_methods_are_not_used():
    class Hiding(dict):
        pass

    description = Hiding(mlp(_target_="os.getcwd"))
    description.pop = description.items = lambda *_: f"{OURS}.MLP"
    with pytest.raises(ValueError, match=re.escape("'os.getcwd'")):
        described_network(description)


def test_values_of_others_are_shown_short():
    nested = []
    for _ in range(60):
        nested = [nested, nested]  # its repr would be longer than all memory
    assert shown(nested) == "list"
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 10**6)) < 120
    assert shown(10**5000) == "an integer of 16610 bits"
    assert shown(torch.zeros(2)) == "Tensor"


# --- networks without values


def test_a_skeleton_takes_no_memory_and_little_time():
    started = time.monotonic()
    network = skeleton(lambda: Classifier(MLP((4096, 2**14, 2**14), 10**6, [2**20] * 256), 10**6))
    assert time.monotonic() - started < 20
    assert {value.device.type for value in network.parameters()} == {"meta"}


def test_the_mode_ends_with_the_skeleton():
    with pytest.raises(ZeroDivisionError):
        skeleton(lambda: 1 / 0)
    assert nn.Linear(2, 2).weight.device.type == "cpu"


# One of each construction: RegNet computes widths with tensors, Swin and MaxViT index tables, MNASNet and
# DenseNet names.
@pytest.mark.parametrize(
    "name",
    [
        "regnet_x_400mf",
        "swin_v2_t",
        "maxvit_t",
        "mnasnet0_5",
        "densenet121",
        "googlenet",
        "inception_v3",
        "vit_b_16",
    ],
)
def test_skeletons_of_torchvision_have_the_shapes_of_the_networks(name):
    pytest.importorskip("torchvision")
    make = described_network({"_target_": f"{OURS}.torchvision_model", "name": name, "n_classes": 3})
    network = skeleton(make)
    real = make().state_dict()
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in real.items()}
    assert {value.device.type for value in network.parameters()} == {"meta"}
