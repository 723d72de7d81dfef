"""Reading a foreign file has no side effects; foreign_files_worker.py makes the files and watches."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradsigns_lightning.runs.config import SCHEMAS

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("h5py")
pytest.importorskip("torchvision")
pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux", reason="only Linux reports files that are opened unseen by Python"
    ),
    pytest.mark.timeout(600),  # a minute, on a machine of one's own
]

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t-81c2"
MEGABYTES = 100  # beyond what reading genuine files has taken; the files ask for gigabytes
# What commands do by themselves: typing evaluates annotations, `train` seeds before it reads, and each
# command keeps the processes that it starts away from the modules of the current folder.
HARMLESS = {
    *("exec by typing", "os.putenv b'PL_GLOBAL_SEED'", "os.putenv b'PL_SEED_WORKERS'"),
    *("os.putenv b'PYTHONSAFEPATH'", "os.unsetenv b'PYTHONSAFEPATH'"),
}
READERS = {
    *(
        "verify",
        "trace",
        "judge",
        "control",
        "init",
        "strip",
        "onnx",
        "onnx control",
        "images",
        "data",
        "import-2021",
    ),
    *(
        "imported images",
        "imported mean",
        "key",
        "master",
        "committed",
        "copied",
        "trained",
        "bundle",
        "commitment",
        "journal",
    ),
    *("signer", "reply", "authority"),
}
WRITTEN = {("verify", "bundle"), ("commit", "out"), ("strip", "out"), ("keygen", "out")}
WRITTEN |= {("report", "out"), ("report", "folder"), ("benchmark", "folder")}
WRITTEN |= {("train", "code")}  # the user's own, to be run
# These are read by the same functions as in `verify`; the other commands ignore an API's journal.
AS_VERIFY = {
    (command, setting) for command in ("trace", "judge") for setting in ("onnx", "images", "api.journal")
}
AS_VERIFY |= {("attack", "checkpoint"), ("attack", "key")}
AS_VERIFY |= {("judge", "authority"), ("commit", "api.journal"), ("import-2021", "api.journal")}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")  # the worker looks for the word "foreign"
    command = [sys.executable, str(Path(__file__).with_name("foreign_files_worker.py")), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


def misdeeds(attack) -> list[str]:
    """What an attack achieved."""
    found = [event for event in attack["events"] if event not in HARMLESS]
    if attack["megabytes"] > MEGABYTES:
        found.append(f"{attack['megabytes']} MiB")
    if SECRET in attack.get("out", "") + attack.get("err", ""):
        found.append("the secret was printed")
    return found


def test_genuine_files_are_read(report):
    assert {
        reader: run["err"] for reader, run in report["genuine"].items() if run["code"] not in (0, 3)
    } == {}
    assert set(report["genuine"]) == READERS - {"reply", "authority"}


def test_no_file_does_anything(report):
    assert {
        f"{attack['reader']}: {attack['name']}": misdeeds(attack)
        for attack in report["attacks"]
        if misdeeds(attack)
    } == {}
    assert {attack["reader"] for attack in report["attacks"]} == READERS
    assert len(report["attacks"]) > 230


def files_of(schema, prefix=""):
    """Yield the settings of a command that name a file or folder."""
    for entry in dataclasses.fields(schema):
        if entry.metadata.get("value", "").strip("[],.") in ("FILE", "FILE,...", "FOLDER"):
            yield prefix + entry.name
        if dataclasses.is_dataclass(entry.default_factory):
            yield from files_of(entry.default_factory, f"{entry.name}.")


def test_every_setting_that_names_a_file_is_walked(report):
    named = {
        (command, setting)
        for command, schema in SCHEMAS.items()
        for setting in files_of(schema)
        if setting != "json"
    }
    walked = {(command, setting) for command, setting in report["walked"]}
    assert named - WRITTEN - AS_VERIFY - walked == set()
    assert walked - named == {("verify", "paths.data")}
    assert named >= WRITTEN | AS_VERIFY


def test_every_file_is_refused_in_one_line(report):
    unclear = {}
    for attack in report["attacks"]:
        lines = attack["err"].splitlines()
        clear = (
            len(lines) == 1
            and lines[0].startswith("gradsigns: `")
            and len(lines[0]) < 600
            and not attack["out"]
        )
        if attack["code"] != 1 or not clear:
            unclear[f"{attack['reader']}: {attack['name']}"] = attack["code"], attack["err"][:300]
    assert unclear == {}


def test_functions_that_read_do_nothing_else(report):
    for name, calls in report["functions"].items():
        assert misdeeds(calls) == [], name
        assert calls["unclean"] == [], name
        assert calls["inputs"] > 0, name
    assert sum(calls["inputs"] for calls in report["functions"].values()) > 400


# --- the check can fail


def test_the_watch_sees_every_guilty_act(report):
    assert [act for act, seen in report["guilty"].items() if not misdeeds(seen)] == []
    assert len(report["guilty"]) >= 16


def test_the_watch_sees_what_a_release_did_that_composed_and_instantiated(report):
    seen = {name.split()[0]: misdeeds(attack) for name, attack in report["before"].items()}
    assert "a bait was opened" in seen["nested"]
    assert any(event.startswith("os.system") for event in seen["nested"]), seen["nested"]
    assert any(event.startswith("resolved") for event in seen["${...}"]), seen["${...}"]
    assert "the secret was printed" in seen["${...}"]
    assert any(event.startswith("hydra.compose") for event in seen["data"]), seen["data"]
    assert any(event.startswith("os.system") for event in seen["data"]), seen["data"]
