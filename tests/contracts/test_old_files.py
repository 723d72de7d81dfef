"""Old files are read with the same numbers, or, where a change of the format forbids it, refused with advice.

The files in ``tests/fixtures`` are never regenerated (see the README of each folder). ``numbers.json`` holds
what the code that made them read from them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pickletools
import re
import shutil
import zipfile
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch

from gradsigns_lightning import GradSigns, WatermarkKey, read_message, strip, trace, verify_api
from gradsigns_lightning.cli import main
from gradsigns_lightning.data import Digits
from gradsigns_lightning.models import MLP, Classifier

FIXTURES = Path(__file__).parents[1] / "fixtures"
FORMER, LAST = FIXTURES / "made_at_62066a0", FIXTURES / "made_at_0_1_0"
BOTH = pytest.mark.parametrize("made", [FORMER, LAST], ids=lambda path: path.name)
JOURNAL = {"answers.jsonl": "verify_api", "labels.jsonl": "verify_api_labels"}
JOURNALS = pytest.mark.parametrize("journal", JOURNAL)
KEYS = ("digits", "rgb", "master", "customer", "message")
SAME = (
    "n_bits",
    "n_matches",
    "n_erasures",
    "bit_error_rate",
    "p_value",
    "verdict",
    "commitment",
    "n_queries",
    "alpha",
)
# Issue 16: every image's gradient counts alike (before, images of low confidence outweighed the others), so
# the smallest margin of a white-box reading has changed; the bits are the same.
MARGIN_TODAY = {FORMER: 0.40067, LAST: 0.38142}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@functools.cache
def numbers(made):
    """Return what was read then; outside of files the estimator has a different name now."""
    text = (made / "numbers.json").read_text()
    return json.loads(text.replace('"estimator": "blocks"', '"estimator": "groups"'))


def images(made, *, chosen=None):
    found = torch.from_numpy(np.load(made / "images.npy")).float() / 255
    return found if chosen is None else found[chosen]


def taken(made, *names):
    """Copy files into the current folder."""
    for name in names:
        shutil.copy(made / name, name)


def result(*words):
    """Run a command and return what it found."""
    assert main([*words, "json=found.json"]) in (0, 3)
    return json.loads(Path("found.json").read_text())


def nearly(value):
    """What a value equals that was computed by another machine."""
    if isinstance(value, dict):
        return {name: nearly(part) for name, part in value.items()}
    return pytest.approx(value, rel=1e-3, abs=0) if isinstance(value, float) else value


def digest(tensor, dtype):
    return hashlib.sha256(tensor.numpy().astype(dtype).tobytes()).hexdigest()


def facts(key):
    return {
        "commitment": key.commitment,
        "public": key.to_public_dict(),
        "carriers_sha256": digest(key.carriers, "<i8"),
        "projection_sha256": digest(key.projection, "i1"),
        "signature": np.packbits(key.signature.numpy(), bitorder="little").tobytes().hex(),
    }


@BOTH
@pytest.mark.parametrize("name", KEYS)
def test_a_key_derives_what_it_derived(made, name):
    assert facts(WatermarkKey.load(made / f"{name}.gskey")) == numbers(made)["keys"][name]


@BOTH
def test_a_signed_model_is_read_with_the_same_numbers(made):
    found, then = (
        result("verify", f"checkpoint={made / 'model.ckpt'}", f"key={made / 'digits.gskey'}"),
        numbers(made)["verify"],
    )
    assert {name: found[name] for name in SAME} == nearly({name: then[name] for name in SAME})
    assert found["verdict"] == "owned"
    assert found["margin"] == nearly(MARGIN_TODAY[made])


def images_read(made):
    return images(made, chosen=numbers(made)["images_of_the_journals"])


def nobody(_):
    raise AssertionError("the journal holds all answers")


@BOTH
@JOURNALS
def test_a_journal_is_read_with_the_same_numbers_and_nobody_is_asked(made, journal):
    taken(made, journal)
    before = Path(journal).read_bytes()
    found = verify_api(nobody, made / "digits.gskey", images_read(made), journal=journal).to_dict()
    then = numbers(made)[JOURNAL[journal]]
    assert {name: found[name] for name in then} == nearly(then)
    assert Path(journal).read_bytes() == before


@BOTH
@JOURNALS
def test_a_reading_goes_on_from_the_beginning_of_a_journal(made, journal):
    lines = (made / journal).read_bytes().splitlines(keepends=True)
    answers = iter(json.loads(line)["answer"] for line in lines[3:])
    Path(journal).write_bytes(b"".join(lines[:3]))
    found = verify_api(
        lambda _: np.array(next(answers)), made / "digits.gskey", images_read(made), journal=journal
    ).to_dict()
    then = numbers(made)[JOURNAL[journal]]
    assert {name: found[name] for name in then} == nearly(then)
    assert Path(journal).read_bytes() == b"".join(lines)


def test_a_former_journal_of_images_in_doubt_is_refused_with_what_to_do():
    """Issue 16: if the first images are hardly recognised, more of them are queried."""
    taken(FORMER, "doubtful.jsonl")
    before = Path("doubtful.jsonl").read_bytes()
    with pytest.raises(
        ValueError,
        match=r"made by a version that queries other images\. Name another "
        r"file to query again",
    ):
        verify_api(nobody, FORMER / "digits.gskey", images(FORMER), journal="doubtful.jsonl")
    assert Path("doubtful.jsonl").read_bytes() == before


COMMITMENT = [f"digits.commitment.{ending}" for ending in ("json", "tsr", "pem")]
ATTACH = ("commit", "out=digits.commitment.json", "attach=digits.commitment.tsr")


def test_a_commitment_is_read_with_its_time_stamp():
    taken(LAST, *COMMITMENT)
    found, then = (
        result(*ATTACH, f"key={LAST / 'digits.gskey'}", f"authority={LAST / 'authority.pem'}"),
        numbers(LAST)["commitment"],
    )
    assert {name: found[name] for name in then} == then


@BOTH
def test_a_bundle_is_made_with_a_signer_of_that_time(made):
    """The signing key is kept, where the former commitment has to be made again."""
    signer = made / "digits.commitment.pem"
    committed = result(
        "commit", f"key={made / 'digits.gskey'}", f"signer={signer}", "out=again.commitment.json"
    )
    assert committed["signer"] == numbers(made)["commitment"]["signer"]
    checkpoint = ("verify", f"checkpoint={made / 'model.ckpt'}", f"key={made / 'digits.gskey'}")
    assert (
        result(*checkpoint, "bundle=again.gsbundle", "commitment=again.commitment.json")["verdict"] == "owned"
    )


@pytest.mark.parametrize("name", ["digits", "unstamped"])
def test_a_former_commitment_is_refused_with_what_to_do(name, capsys):
    """Issue 16: it held the key's own digest, which is in checkpoints, so anybody could have it stamped."""
    taken(FORMER, *COMMITMENT)
    shutil.copy(FORMER / f"{name}.commitment.json", "digits.commitment.json")
    assert main([*ATTACH, f"key={FORMER / 'digits.gskey'}", f"authority={FORMER / 'authority.pem'}"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "`commitment` has format 'gradsigns-commitment/1'" in said
    assert "Commit to the same keys again with `gradsigns commit`" in said


def judged(made):
    return [
        "judge",
        f"bundle={made / 'digits.gsbundle'}",
        f"checkpoint={made / 'model.ckpt'}",
        "data=digits",
        f"authority={made / 'authority.pem'}",
        "suspect_since=2100-01-01T00:00:00+00:00",
        "grinding_bits=0",
    ]


def test_a_bundle_is_judged_with_the_same_numbers():
    found, then = result(*judged(LAST)), numbers(LAST)["judge"]
    assert found["verdict"] == "owned"
    assert {name: found[name] for name in then} == nearly(then)


def test_a_former_bundle_is_refused_with_what_to_do(capsys):
    """It holds a former commitment; the journal that it was made from is read."""
    assert main(judged(FORMER)) == 1
    assert "Commit to the same keys again with `gradsigns commit`" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize("read", [trace, read_message])
def test_a_former_master_traces_no_copies_and_says_so(read):
    """Issue 16: customers' signatures were words of a linear code, so three of them could frame a fourth."""
    with pytest.raises(
        ValueError, match="`master` must be a key of version 2 or later, got version 1; make a new one"
    ):
        read(MLP((3, 16, 16), 10), FORMER / "master.gskey", torch.rand(60, 3, 16, 16))


def training(made, *, key=None, epochs=3):
    """Resume the training after two epochs; returns the callback and its state at the start."""
    mark = GradSigns(made / "digits.gskey" if key is None else key)
    found = []

    class Start(L.Callback):
        def on_train_start(self, trainer, pl_module):
            found.append((trainer.global_step, mark.state_dict()["watermarker"]))

    torch.manual_seed(0)
    model = Classifier(
        MLP((1, 8, 8), 10, hidden=[8]),
        10,
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        lr_schedule="constant",
    )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        limit_val_batches=0,
        callbacks=[mark, Start()],
        **quiet,
    )
    trainer.fit(
        model, datamodule=Digits(mean=[0.305], std=[0.376], batch_size=64), ckpt_path=made / "training.ckpt"
    )
    return mark, *found[0]


@BOTH
@pytest.mark.filterwarnings("ignore::UserWarning")  # so short a fit leaves no mark, and says so
def test_a_training_goes_on(made):
    mark, step, state = training(made)
    then = numbers(made)["training"]
    assert step == then["global_step"]
    assert {name: state[name] for name in ("first_step", "last_step")} == {
        n: then[n] for n in ("first_step", "last_step")
    }
    assert mark.state_dict()["watermarker"]["last_step"] > step, "nothing was embedded any more"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_training_goes_on_with_all_of_its_state():
    _, _, state = training(LAST)
    then = numbers(LAST)["training"]
    assert state["factor"] == then["factor"]
    assert state["task_gradient"] == nearly(
        {int(name): value for name, value in then["task_gradient"].items()}
    )
    assert float(state["mean_gradient"].sum()) == nearly(then["mean_gradient_sum"])


def test_a_training_tells_which_settings_are_others_now(recwarn):
    """Issue 15: strength and cadence have new defaults and a new meaning."""
    training(FORMER)
    (told,) = [str(w.message) for w in recwarn if "differs from the checkpoint" in str(w.message)]
    assert "strength: " in told
    assert "cadence: " in told
    assert "commitment" not in told
    recwarn.clear()
    training(LAST)
    assert not [w for w in recwarn if "differs from the checkpoint" in str(w.message)]


@BOTH
def test_a_checkpoint_is_stripped(made, tmp_path):
    removed = strip(made / "training.ckpt", tmp_path / "release.ckpt")
    assert set(removed) == {
        "gradsigns",
        f"callbacks.GradSigns[{numbers(made)['keys']['digits']['commitment']}]",
    }
    assert strip(made / "model.ckpt", tmp_path / "model.ckpt") == ("hyper_parameters.gradsigns",)


def texts(path):
    """Return all text in a file; for a pickle its strings and the names of its types."""
    if not zipfile.is_zipfile(path):
        return [path.read_bytes().decode("latin-1")]
    with zipfile.ZipFile(path) as archive:
        pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    return [
        argument
        for pickled in pickles
        for _, argument, _ in pickletools.genops(pickled)
        if isinstance(argument, str)
    ]


@pytest.mark.parametrize(
    "path", sorted(set(LAST.iterdir()) - {LAST / "README.md"}), ids=lambda path: path.name
)
def test_files_name_no_module_that_could_move(path):
    """The only name of this package in them is a network's, which is looked up in a list and not imported."""
    named = {name for text in texts(path) for name in re.findall(r"gradsigns_lightning[\w.]*", text)}
    assert named == ({"gradsigns_lightning.models.MLP"} if path.name == "model.ckpt" else set())
