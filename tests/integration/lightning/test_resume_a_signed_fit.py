"""Checkpoints of a signed fit.

A resumed fit equals the uninterrupted one, and the file reveals nothing about the key but its commitment.
"""

import base64
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from signed_digits import SECRET, Net, conv_net, make_key, make_mark, make_trainer, train_loader, val_loader

from gradsigns_lightning import MarginObjective, StrengthSchedule

# Every batch of 40 holds 4 images of the class and every step after a resume sees one before it embeds: the
# buffer is full. Few bits and a small margin, so that the cadence backs off within these four epochs.
SETTINGS = {
    "key": make_key(8),
    "momentum": 0.5,
    "n_images": 4,
    "cadence": 3,
    "strength": StrengthSchedule(2.0, warmup_steps=12),
    "objective": MarginObjective(0.3),
}


def fit(mark, folder=None, *, max_epochs, ckpt_path=None):
    torch.manual_seed(3)
    model = Net(conv_net())
    keep = [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)] if folder else []
    trainer = make_trainer(mark, *keep, enable_checkpointing=bool(keep), max_epochs=max_epochs)
    trainer.fit(model, train_loader(400, shuffle=False), val_loader(), ckpt_path=ckpt_path)
    return model, trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    mark = make_mark(**SETTINGS)
    model, _ = fit(mark, folder, max_epochs=4)
    factors = {state_in(folder, epoch)["watermarker"]["factor"] for epoch in (1, 2, 3)}
    assert max(factors) > 1, "the cadence never backed off, so a resume that forgot it would not show"
    return folder, model.state_dict(), mark.state_dict()


def saved(folder, epoch):
    return torch.load(folder / f"epoch={epoch - 1}.ckpt", weights_only=True)


def state_in(folder, epoch):
    (state,) = (v for k, v in saved(folder, epoch)["callbacks"].items() if k.startswith("GradSigns"))
    return state


def assert_states_equal(a, b):
    mean_a, mean_b = a["watermarker"].pop("mean_gradient"), b["watermarker"].pop("mean_gradient")
    assert a == b
    assert set(a) == {"watermarker"}
    assert set(a["watermarker"]) == {"first_step", "last_step", "factor", "task_gradient"}
    assert all(isinstance(v, (int, float)) for name, v in a["watermarker"].items() if name != "task_gradient")
    assert list(a["watermarker"]["task_gradient"]) == [0]
    assert mean_a is not None
    assert torch.equal(mean_a, mean_b)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_resumed_fit_equals_the_uninterrupted_one(run, epoch):
    folder, weights, state = run
    restored = {}

    class Watch(type(make_mark())):
        def on_train_start(self, trainer, pl_module):
            restored.update(self.state_dict())

    mark = Watch(**SETTINGS)
    model, _ = fit(mark, max_epochs=4, ckpt_path=folder / f"epoch={epoch - 1}.ckpt")
    assert_states_equal(restored, state_in(folder, epoch))
    final = mark.state_dict()
    assert_states_equal(
        {**final, "watermarker": dict(final["watermarker"])},
        {**state, "watermarker": dict(state["watermarker"])},
    )
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_restored_state_is_not_what_a_used_callback_had(run):
    folder, weights, _ = run
    mark = make_mark(**SETTINGS)
    fit(mark, max_epochs=3)  # leaves later steps and other images behind
    model, _ = fit(mark, max_epochs=4, ckpt_path=folder / "epoch=0.ckpt")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def _leaves(value, path=""):
    if isinstance(value, dict):
        for k, v in value.items():
            yield f"{path}/{k}", k
            yield from _leaves(v, f"{path}/{k}")
    elif isinstance(value, (list, tuple, set)):
        for i, v in enumerate(value):
            yield from _leaves(v, f"{path}/{i}")
    else:
        yield path, value


def _as_array(value):
    return (
        value.detach().double().flatten().numpy()
        if isinstance(value, torch.Tensor)
        else np.asarray([], dtype=float)
    )


def test_a_checkpoint_has_the_commitment_and_no_secret(run):
    folder, *_ = run
    key = SETTINGS["key"]
    leaves = list(_leaves(saved(folder, 3)))
    assert any(key.commitment == value for _, value in leaves)
    parts = {
        name: getattr(key, name).double().flatten().numpy()
        for name in ("carriers", "projection", "signature")
    }
    spread = np.zeros(64)
    spread[key.carriers.numpy()] = 1
    for path, value in leaves:
        array = _as_array(value)
        for name, part in parts.items():
            assert len(array) != len(part) or not np.array_equal(array, part), f"{name} at {path}"
            assert len(array) != len(part) or not np.array_equal(array > 0, part > 0), (
                f"{name}'s signs at {path}"
            )
        text = value if isinstance(value, bytes) else str(value).encode()
        assert not any(form in text for form in _secret_forms()), path
    with zipfile.ZipFile(Path(folder) / "epoch=2.ckpt") as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert key.commitment.encode() in content
    assert not any(form in content for form in _secret_forms())


def _secret_forms():
    return SECRET, SECRET.hex().encode(), base64.b64encode(SECRET)[:40]


def test_the_mean_gradient_in_a_checkpoint_does_not_tell_the_carriers(tmp_path):
    key = make_key(16, n_carriers=40)
    mark = make_mark(key, momentum=0.5)
    fit(mark, tmp_path, max_epochs=1)
    mean = state_in(tmp_path, 1)["watermarker"]["mean_gradient"]
    assert mean.shape == (64,)
    others = torch.ones(64, dtype=torch.bool)
    others[key.carriers] = False
    assert int((mean[others] != 0).sum()) > 12


def test_another_key_on_resume_warns(run):
    folder, *_ = run
    mark = make_mark(**SETTINGS | {"key": make_key(8, secret=bytes(32))})
    with pytest.warns(
        UserWarning,
        match=r"GradSigns 'wm' differs from the checkpoint: commitment: \w{64} -> "
        r"\w{64}\.$",
    ):
        fit(mark, max_epochs=2, ckpt_path=folder / "epoch=0.ckpt")


def test_changed_settings_on_resume_warn_and_equal_ones_do_not(run, recwarn):
    folder, *_ = run
    fit(make_mark(**SETTINGS), max_epochs=2, ckpt_path=folder / "epoch=0.ckpt")
    assert not [w for w in recwarn if "differs from the checkpoint" in str(w.message)]
    with pytest.warns(UserWarning, match=r"n_images: 4 -> 8; momentum: 0.5 -> 0.25\."):
        fit(
            make_mark(**SETTINGS | {"n_images": 8, "momentum": 0.25}),
            max_epochs=2,
            ckpt_path=folder / "epoch=0.ckpt",
        )


def test_a_checkpoint_made_without_the_callback_is_accepted(tmp_path, recwarn):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Net(conv_net()), train_loader(400))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    mark = make_mark(**SETTINGS)
    fit(mark, max_epochs=2, ckpt_path=tmp_path / "plain.ckpt")
    assert mark.state_dict()["watermarker"]["first_step"] == 11
    assert not [w for w in recwarn if "differs from the checkpoint" in str(w.message)]
