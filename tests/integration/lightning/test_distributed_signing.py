"""Two gloo processes on the CPU sign as one process with the whole batch does."""

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from signed_digits import (
    TARGET,
    DealtNet,
    Net,
    Recorder,
    held_out_target_images,
    make_key,
    make_mark,
    make_trainer,
    train_loader,
    train_set,
    val_loader,
    val_set,
)
from torch.utils.data import DataLoader, TensorDataset

from gradsigns_lightning import verify

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]
# A hang must not outlive the test: a collective that waits this long raises in every rank.
PATIENCE = timedelta(seconds=30)
# Large enough for all target images of an epoch, so that two ranks' buffers hold together what one process's
# buffer holds.
SETTINGS = {"n_images": 200, "momentum": 0.5}


def spawn():
    return {
        "strategy": DDPStrategy(start_method="spawn", process_group_backend="gloo", timeout=PATIENCE),
        "devices": 2,
    }


def fit(folder, model, *loaders, **settings):
    mark = make_mark(**SETTINGS)
    make_trainer(mark, Recorder(folder, mark), **({"max_epochs": 1} | settings)).fit(model, *loaders)


def records(folder, n=2):
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(n)]


def assert_ranks_agree(folder):
    first, second = records(folder)
    for name in ("wm/ber", "wm/p_value", "wm/log10_p_value", "wm/margin", "val_accuracy", "wm/loss"):
        torch.testing.assert_close(first["metrics"][name], second["metrics"][name], rtol=1e-6, atol=0)
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name])
    one, two = (dict(r["state"]["watermarker"]) for r in (first, second))
    assert torch.equal(one.pop("mean_gradient"), two.pop("mean_gradient"))
    assert one == two
    assert first["sampler"].startswith("DistributedSampler")
    return first


def assert_equals_one_process(record, reference):
    for name, value in reference["model"].items():
        torch.testing.assert_close(record["model"][name], value, rtol=1e-4, atol=1e-5)
    given, expected = (r["state"]["watermarker"]["mean_gradient"] for r in (record, reference))
    assert (given - expected).norm() < 1e-3 * expected.norm()
    for name in ("wm/ber", "wm/margin", "wm/loss"):
        torch.testing.assert_close(record["metrics"][name], reference["metrics"][name], rtol=1e-3, atol=1e-4)
    assert record["state"]["watermarker"]["last_step"] == reference["state"]["watermarker"]["last_step"]


def test_ddp_spawn_equals_one_process_though_one_rank_has_no_target_image(tmp_path):
    """Target images at even places all go to rank 0, in training and in validation.

    The sampler deals images to the ranks in turn.
    """

    def dealt(data):
        x, y = data.tensors
        target, others = (y == TARGET).nonzero().flatten(), (y != TARGET).nonzero().flatten()
        # Per 40 places: 4 target images at places 0, 10, 20 and 30; the rest others.
        places = []
        for i in range(len(target) // 4):
            block = others[36 * i : 36 * (i + 1)].tolist()
            for j in range(4):
                block.insert(10 * j, int(target[4 * i + j]))
            places += block
        return TensorDataset(x[places], y[places])

    data, val = dealt(train_set()), dealt(val_set())
    assert all(int(i) % 2 == 0 for i in (data.tensors[1] == TARGET).nonzero())
    for name, settings in (("one", {}), ("two", spawn())):
        (tmp_path / name).mkdir()
        fit(tmp_path / name, DealtNet(data, val, 40), **settings)
    record = assert_ranks_agree(tmp_path / "two")
    (reference,) = records(tmp_path / "one", 1)
    assert_equals_one_process(record, reference)
    assert record["metrics"]["wm/ber"] < 0.1  # something was embedded, so there was something to agree on


def test_ddp_script_equals_one_process(tmp_path):
    """Run Lightning's own launcher in a process group that is killed as a whole if it hangs."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "PL_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    script = Path(__file__).with_name("ddp_script.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output
    record = assert_ranks_agree(tmp_path)
    (tmp_path / "one").mkdir()
    # of Lightning's sampler, epoch 0
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tolist()
    loader = DataLoader(train_set(400), 40, sampler=order)
    fit(tmp_path / "one", Net(optimizer="sgd"), loader, val_loader())
    assert_equals_one_process(record, records(tmp_path / "one", 1)[0])


def test_a_ddp_spawn_fit_resumes_from_a_checkpoint_and_ends_signed(tmp_path):
    key = make_key(8)

    def run(folder, batch_size, **settings):
        (tmp_path / folder).mkdir()
        mark, model = make_mark(key, momentum=0.2), Net()
        keep = ModelCheckpoint(tmp_path / folder, filename="last")
        trainer = make_trainer(
            mark, keep, Recorder(tmp_path / folder, mark), enable_checkpointing=True, **settings
        )
        return model, trainer, train_loader(800, batch_size), val_loader(50)

    model, trainer, *loaders = run("first", 20, max_epochs=1)
    trainer.fit(model, *loaders)
    model, trainer, *loaders = run("second", 10, max_epochs=5, **spawn())
    trainer.fit(model, *loaders, ckpt_path=tmp_path / "first" / "last.ckpt")
    saved, after = records(tmp_path / "first", 1)[0]["state"], assert_ranks_agree(tmp_path / "second")
    for record in records(tmp_path / "second"):
        restored = record["restored"]
        assert torch.equal(
            restored["watermarker"].pop("mean_gradient"), saved["watermarker"]["mean_gradient"]
        )
        assert restored["watermarker"] == {
            k: v for k, v in saved["watermarker"].items() if k != "mean_gradient"
        }
    assert after["state"]["watermarker"]["last_step"] > saved["watermarker"]["last_step"]
    # Lightning brings weights and metrics back to the main process.
    assert (
        float(trainer.callback_metrics["wm/ber"])
        == verify(model, key, held_out_target_images()).bit_error_rate
        == 0
    )
    assert "training_step" not in vars(model)
