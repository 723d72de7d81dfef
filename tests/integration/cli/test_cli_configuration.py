"""The configuration files: they compose, fit the code they name, and misspelt words are refused."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object
from omegaconf import OmegaConf

from gradsigns_lightning import Cadence, GradSigns, StrengthSchedule, WatermarkKey
from gradsigns_lightning.cli import main
from gradsigns_lightning.runs.build import build, to_plain
from gradsigns_lightning.runs.config import SCHEMAS, TrainConfig, config_folder, register_schemas
from gradsigns_lightning.runs.fit import build_watermark
from gradsigns_lightning.runs.own import build_callbacks

ROOT = Path(__file__).parents[3]
CONF = Path(config_folder())
OUT = "paths.output_dir=."
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
GROUPS = sorted(
    (folder.name, file.stem)
    for folder in CONF.iterdir()
    # Attacks have a test of their own.
    if folder.name not in ("attack", "experiment", "callbacks", "debug", "paths", "data", "protocol")
    and folder.is_dir()
    for file in folder.glob("*.yaml")
    if (folder.name, file.stem) != ("model", "own")
)
DATA = sorted({file.stem for file in (CONF / "data").glob("*.yaml")} - {"own"})
CALLBACKS = sorted({file.stem for file in (CONF / "callbacks").glob("*.yaml")} - {"gradsigns"})
DEBUG = sorted(file.stem for file in (CONF / "debug").glob("*.yaml"))
# What settings of the mark were called before they were one group.
MOVED = {
    **{name: name for name in ("objective", "engine", "n_images", "momentum", "n_val_images", "cadence")},
    **{"schedule.strength": "strength", "schedule.start_epoch": "strength", "objective.margin": "objective"},
    **{"cadence.every_n_steps": "cadence", "schedule": "strength"},
}
NOT_GIVEN = ["data.n_classes=10", "data.module.root=x"]


def composed(*overrides, command="train"):
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_plain(compose(command, overrides=[OUT, *overrides]))


def targets(config):
    if isinstance(config, dict):
        if "_target_" in config:
            yield config
        for value in config.values():
            yield from targets(value)


def unknown_arguments(node):
    """Return the keys of a node that its target does not take; a class passes `**kwargs` on to its bases."""
    target = get_object(node["_target_"])
    callables = (
        [target]
        if not inspect.isclass(target)
        else [base.__init__ for base in target.__mro__ if "__init__" in vars(base)]
    )
    accepted = set()
    for function in callables:
        parameters = inspect.signature(function).parameters.values()
        accepted |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return set(node) - {"_target_", "_partial_"} - accepted


WANDB_INIT = {"group", "job_type", "tags"}  # WandbLogger hands these to wandb.init


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_command_begins_with_the_one_base(command):
    root = yaml.safe_load((CONF / f"{command}.yaml").read_text())
    assert root["defaults"][:2] == [f"{command}_schema", "base"]
    assert root["hydra"]["job"] == {"name": command}
    assert (root["hydra"].keys() == {"job"}) == (command != "train")
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(command, return_hydra_config=True)
    hydra = OmegaConf.to_container(config.hydra, resolve=False)
    assert (hydra["run"]["dir"] == ".") == (command != "train")
    assert hydra["output_subdir"] == (".hydra" if command == "train" else None)
    # launchers read it before a run begins
    assert config.hydra.sweep.dir.startswith(f"multirun/{command}/")


def test_train_yaml_shows_every_key_with_its_default():
    root = yaml.safe_load((CONF / "train.yaml").read_text())
    groups = [name for entry in root["defaults"] if isinstance(entry, dict) for name in entry]
    keys = {entry.name for entry in dataclasses.fields(TrainConfig)}
    shown = root.keys() - {"defaults", "hydra"}
    assert not shown & set(groups)
    assert keys == (shown | set(groups) | {"paths"}) - {"experiment", "debug"}
    own = TrainConfig()
    assert {name: float(root[name]) if name == "alpha" else root[name] for name in shown} == {
        n: getattr(own, n) for n in shown
    }
    lines = (CONF / "train.yaml").read_text().splitlines()
    assert [
        n for n in shown if not lines[[line.partition(":")[0] for line in lines].index(n) - 1].startswith("#")
    ] == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_with_arguments_that_its_targets_take(experiment):
    config = composed(f"experiment={experiment}")
    nodes = list(targets(config))
    assert len(nodes) >= 7
    assert {node["_target_"]: unknown_arguments(node) for node in nodes if unknown_arguments(node)} == {}


@pytest.mark.parametrize("data", DATA)
def test_every_data_group_has_arguments_that_its_target_takes(data):
    config = composed(f"data={data}", *(NOT_GIVEN if data in ("image_folder", "ytf") else []))
    assert unknown_arguments(config["data"]["module"]) == set()


@pytest.mark.parametrize(
    ("bits", "given", "margin"),
    [
        (8, [], 1.0),
        (32, [], 0.7 * (31 / 32) ** 0.5),
        (8, ["watermark.objective={_target_: gradsigns_lightning.MarginObjective, margin: 0.4}"], 0.4),
    ],
)
def test_the_margin_follows_the_key(bits, given, margin):
    key = WatermarkKey.generate("A", bits, input_shape=(1, 8, 8), n_carriers=64, target_class=0)
    settings = to_plain(composed("key=b32", *given))
    assert build_watermark(settings, key).watermarker.objective.margin == pytest.approx(margin)


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_every_other_group_is_built(group, option, tmp_path):
    WatermarkKey.generate("A", 32, input_shape=(3, 32, 32), target_class=0).save(tmp_path / "a.gskey")
    big = ["data=cifar10"] if group in ("model", "key") else []
    given = {"wandb": ["logger.offline=true"], "file": [f"key.path={tmp_path / 'a.gskey'}"]}.get(option, [])
    command = "benchmark" if group in ("scheme", "recipe") else "train"
    node = composed(*big, f"{group}={option}", *given, command=command)[group]
    assert (
        unknown_arguments(node) <= (WANDB_INIT if option == "wandb" else set()) if node else option == "none"
    )
    if option == "gpu" or not node:
        return
    assert build(node | ({"_partial_": True} if group == "watermark" else {})) is not None


@pytest.mark.parametrize("option", ["default", "paper", "strong"])
def test_every_watermark_signs_with_a_key(option):
    settings = composed("data=cifar10", f"watermark={option}")
    mark = build_watermark(settings, WatermarkKey.generate("A", 32, input_shape=(3, 32, 32), target_class=0))
    assert mark.watermarker.schedule.strength == {"default": 1.0, "paper": 0.3, "strong": 2.0}[option]
    assert (mark.watermarker.cadence == Cadence(1, max_backoff=1)) == (option == "paper")


def test_a_schedule_and_a_cadence_of_ones_own_are_taken():
    words = [
        "watermark.strength={_target_: gradsigns_lightning.StrengthSchedule, strength: 2, start_epoch: 3}",
        "watermark.cadence=20",
    ]
    mark = build_watermark(
        composed(*words), WatermarkKey.generate("A", 32, input_shape=(1, 8, 8), target_class=0)
    )
    assert mark.watermarker.schedule == StrengthSchedule(2, start_epoch=3)
    assert mark.watermarker.cadence == Cadence(20)


@pytest.mark.parametrize("debug", [None, *DEBUG])
def test_every_training_to_look_at_and_every_callback_go_with_every_experiment(debug):
    for experiment in EXPERIMENTS:
        for callbacks in CALLBACKS:
            words = [
                f"experiment={experiment}",
                f"callbacks={callbacks}",
                *([f"debug={debug}"] if debug else []),
            ]
            config = composed(*words)
            assert all(unknown_arguments(node) == set() for node in targets(config["trainer"]))
            built = build_callbacks(config["callbacks"])
            assert [type(callback).__name__ for callback in built] == {
                "none": [],
                "early_stopping": ["EarlyStopping"],
                "model_checkpoint": ["ModelCheckpoint"],
            }[callbacks]
    assert len(EXPERIMENTS) * len(CALLBACKS) >= 15


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (
            "watermark: false",
            "`watermark` is a group of settings and cannot be one value, as a configuration file has it. To "
            "choose",
        ),
        (
            "schedule: {strength: 2}",
            "there is no `schedule` in the configuration of `gradsigns train`. Did you mean "
            "`watermark.strength`?",
        ),
        ("objective: paper", "Did you mean `watermark.objective`?"),
    ],
)
def test_a_file_with_what_is_no_longer_a_setting_is_told_the_new_one(content, hint, tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "old.yaml").write_text(f"# @package _global_\n{content}\n")
    assert main(["train", "--config-dir", str(tmp_path), "experiment=old"]) == 2
    err = capsys.readouterr().err
    assert hint in err
    assert err.count("\n") == 1


def test_what_a_part_of_ones_own_must_be_told_is_shown(capsys):
    assert main(["train", "data=own", "model=own"]) == 2
    err = capsys.readouterr().err
    assert "`data.n_classes=NUMBER data.input_shape=[3,32,32] data.mean=[0.5,0.5,0.5]" in err
    assert "data.module._target_=package.module.Data" in err


def test_a_callback_is_left_out_by_null():
    assert (
        build_callbacks(composed("callbacks=early_stopping", "callbacks.early_stopping=null")["callbacks"])
        == []
    )


def test_a_debugging_run_ends_well(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", "experiment=demo", "trainer.accelerator=cpu", "progress=false", "json=a.json"]
    assert main([*words, "debug=fast_dev_run", "hydra.run.dir=fast"]) == 0
    assert not Path("fast/logs").exists()
    assert main([*words, "debug=profiler", "hydra.run.dir=profiled"]) == 0
    assert "training_step" in Path("profiled/fit-profile.txt").read_text()
    assert main([*words, "debug=overfit", "trainer.max_epochs=2", "hydra.run.dir=one"]) == 0
    found = json.loads(Path("a.json").read_text())
    assert (found["watermark"], found["end_of_fit"]) == (False, None)


def test_the_shipped_settings_are_the_callback_s_own():
    key = WatermarkKey.generate("A", 32, input_shape=(1, 8, 8), target_class=0)
    marks = [build_watermark(to_plain(composed()), key), GradSigns(key)]
    shipped, own = ((mark.watermarker, mark.reader.n_images) for mark in marks)
    assert shipped[0].schedule == own[0].schedule == StrengthSchedule()
    assert shipped[0].cadence == own[0].cadence == Cadence.following()
    assert shipped[0].objective == own[0].objective
    for name in ("engine", "n_images", "momentum", "carrier_layer"):
        assert getattr(shipped[0].settings, name) == getattr(own[0].settings, name)
    assert shipped[1] == own[1]


@pytest.mark.parametrize("command", ["verify", "trace", "judge"])
@pytest.mark.parametrize("protocol", sorted(file.stem for file in (CONF / "protocol").glob("*.yaml")))
def test_every_protocol_is_built(command, protocol):
    given = ["key.path=a.gskey"] if command != "judge" else ["bundle=b"]
    request = ["protocol.request={x: $images}"] if protocol == "json" else []
    node = composed(*given, f"protocol={protocol}", *request, command=command)["protocol"]
    assert unknown_arguments(node) == set()
    assert callable(build(node).request)


def test_the_check_of_arguments_can_fail():
    node = {"_target_": "gradsigns_lightning.StrengthSchedule", "strength": 1.0, "strenght": 2.0}
    assert unknown_arguments(node) == {"strenght"}
    assert unknown_arguments(
        {"_target_": "gradsigns_lightning.data.Digits", "batch": 1, "batch_size": 2}
    ) == {"batch"}


def test_the_paper_experiment_is_the_published_recipe():
    config = composed("experiment=paper_cifar10")
    assert config["trainer"]["max_epochs"] == 200
    assert (config["key"]["n_bits"], config["key"]["n_carriers"]) == (64, 384)
    assert config["watermark"]["strength"] == 0.3
    assert config["watermark"]["cadence"]["every_n_steps"] == 1
    assert config["model"]["bn_momentum"] == 0.01
    assert config["optimizer"]["_target_"] == "torch.optim.Adam"
    assert config["lr_schedule"] == "steps"
    assert config["data"]["module"]["augment"]["shift"] == 0.1


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("watermark.strenght=1", "`watermark.strength`"),
        ("lamda=1", "`watermark.strength`"),
        ("+lamda=1", "`watermark.strength`"),
        ("trainer.max_epoch=3", "`trainer.max_epochs`"),
        ("lr=1", "`optimizer.lr`"),
        ("key=b12", "`key=b128`"),
        ("model=smal_resnet", "`model=small_resnet`"),
        ("experiment=dmo", "`experiment=demo`"),
        ("experimnt=demo", "`experiment`"),
        ("+nonsense=1", "--help"),
        ("seed=abc", "`seed` must be an integer, got 'abc'"),
        ("watermark=maybe", "`watermark` must be one of default, none, paper, strong, got 'maybe'."),
        ("watermark=false", "got false. Did you mean `watermark=none`?"),
        ("watermark=true", "got true. Did you mean `watermark=default`?"),
        *((f"{old}=1", f"Did you mean `watermark.{new}`?") for old, new in MOVED.items()),
        ("data=image_folder", "`data.n_classes`"),
    ],
)
def test_a_wrong_word_gives_one_line_and_exit_code_2(word, hint, capsys):
    assert main(["train", word]) == 2
    captured = capsys.readouterr()
    assert hint in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["watermark.momentum=1.5"], "`watermark.momentum`"),
        (
            ["watermark.cadence={_target_: gradsigns_lightning.Cadence, growth: 2}"],
            "`watermark.cadence.growth`",
        ),
        (["key=b256"], "`key.n_bits` must be at most `key.n_carriers`"),
        (["key.n_bits=many"], "`key.n_bits`"),
        (["trainer.max_epochs=two"], "`trainer.max_epochs`"),
        (["json=nowhere/x.json"], "`json`"),
        (["init=nowhere.ckpt"], "`init`"),
        (["key=nowhere.gskey"], "key file"),
        (["model._target_=os.getcwd"], "`_target_`"),
        (["model._target_=gradsigns_lightning.cli.tables.os.getcwd"], "`_target_`"),
        (["trainer.devices=2", "trainer.strategy=ddp"], "`trainer.strategy`"),
    ],
)
def test_other_errors_give_one_line_and_exit_code_1(words, message, capsys):
    assert (
        main(
            [
                "train",
                "data=digits",
                "model=mlp",
                "key=b32",
                "trainer.accelerator=cpu",
                "progress=false",
                *words,
            ]
        )
        == 1
    )
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_the_full_error_is_to_be_had(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match=r"`watermark\.momentum`"):
        main(["train", "data=digits", "model=mlp", "key=b32", "watermark.momentum=1.5", "progress=false"])


def test_an_absent_optional_package_names_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", "data=digits", "model=mlp", "key=b32", "logger=wandb", "progress=false"]) == 1
    assert "gradsigns-lightning[wandb]" in capsys.readouterr().err


def test_the_sweep_file_makes_command_lines_that_compose():
    sweep = yaml.safe_load((ROOT / "docs" / "wandb-sweep.yaml").read_text())
    assert sweep["command"] == ["${env}", "${program}", "train", "${args_no_hyphens}"]
    assert sweep["metric"] == {"name": "wm/ber", "goal": "minimize"}
    choices = {name: entry.get("values", [entry.get("value")]) for name, entry in sweep["parameters"].items()}
    for position in (0, -1):
        # W&B writes `name=value` for every parameter.
        config = composed(*(f"{name}={values[position]}" for name, values in choices.items()))
        assert config["watermark"]["strength"] == choices["watermark.strength"][position]
        assert config["key"]["n_bits"] == int(choices["key"][position][1:])
        assert config["logger"]["_target_"].endswith("WandbLogger")
