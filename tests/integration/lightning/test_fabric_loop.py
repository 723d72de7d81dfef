"""A Fabric loop carries the same mark as a fit of a Trainer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from signed_digits import conv_net, held_out_target_images, make_key, mlp, train_set
from torch.nn import functional as F
from torch.utils.data import DataLoader

from gradsigns_lightning import FabricGradSigns, verify

pytestmark = pytest.mark.usefixtures("seeded")


def train(fabric, net, watermark=None, *, epochs=4, batch_size=40, n=600, lr=0.1, shuffle=True):
    """Return the losses of an ordinary Fabric loop."""
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr))
    loader = fabric.setup_dataloaders(DataLoader(train_set(n), batch_size, shuffle=shuffle))
    step, losses = 0, []
    for epoch in range(epochs):
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            if watermark:
                loss = loss + watermark.loss(model, images, labels, step=step, epoch=epoch)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            step += 1
            losses.append(loss.item())
    return model, losses


def one_device(**settings):
    return Fabric(**({"accelerator": "cpu", "devices": 1} | settings))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("net", [mlp, conv_net])
def test_a_fabric_loop_is_signed(net, precision):
    fabric, key = one_device(precision=precision), make_key(8)
    watermark = FabricGradSigns(fabric, key, strength=1.0, cadence=1)
    model, _ = train(fabric, net(), watermark)
    assert verify(model.module.float(), key, held_out_target_images()).bit_error_rate == 0


def test_strength_zero_changes_nothing():
    results = []
    for strength in (None, 0.0):
        torch.manual_seed(0)
        fabric = one_device()
        watermark = None if strength is None else FabricGradSigns(fabric, make_key(8), strength=strength)
        results.append(train(fabric, conv_net(dropout=0.2), watermark, epochs=1)[1])
    assert results[0] == results[1]


def test_the_state_goes_through_a_checkpoint(tmp_path):
    fabric = one_device()
    watermark = FabricGradSigns(fabric, make_key(8), strength=1.0, cadence=3)
    train(fabric, mlp(), watermark, epochs=1)
    fabric.save(tmp_path / "state.ckpt", {"watermark": watermark})
    restored = FabricGradSigns(fabric, make_key(8), strength=1.0, cadence=3)
    fabric.load(tmp_path / "state.ckpt", {"watermark": restored})
    first, second = watermark.state_dict(), restored.state_dict()
    assert torch.equal(first.pop("mean_gradient"), second.pop("mean_gradient"))
    assert first == second
    assert first["last_step"] is not None


def test_what_cannot_be_signed_is_refused():
    with pytest.raises(ValueError, match="`fabric` must use one of SingleDeviceStrategy, DDPStrategy"):
        FabricGradSigns(type("F", (), {"strategy": object()})(), make_key(8))
    fabric, net = one_device(), mlp()
    net.append(torch.nn.BatchNorm1d(10, track_running_stats=False))
    with pytest.raises(ValueError, match="module '5' keeps no running statistics"):
        train(fabric, net, FabricGradSigns(fabric, make_key(8)))
    with pytest.raises(ValueError, match="`images` must be floating point of shape"):
        FabricGradSigns(fabric, make_key(8)).loss(net, torch.rand(2, 3, 8, 8), torch.zeros(2).long(), step=0)


SCRIPT = """
import sys
import torch
from lightning.fabric import Fabric
from test_fabric_loop import make_key, mlp, train
from gradsigns_lightning import FabricGradSigns

fabric = Fabric(accelerator="cpu", devices=int(sys.argv[2]), strategy="ddp" if sys.argv[2] == "2" else "auto")
fabric.launch()
torch.manual_seed(0)
watermark = FabricGradSigns(
    fabric, make_key(8), strength=1.0, cadence=2, n_images=100, engine="double_backward"
)
batch_size = 40 // fabric.world_size
model, _ = train(fabric, mlp(), watermark, epochs=2, batch_size=batch_size, n=400, shuffle=False)
if fabric.global_rank == 0:
    torch.save(model.module.state_dict(), sys.argv[1])
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def test_two_processes_sign_as_one(tmp_path):
    weights = []
    for n_processes in (1, 2):
        path = tmp_path / f"{n_processes}.pt"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "PL_", "LT_"))}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        subprocess.run(
            [sys.executable, str(script), str(path), str(n_processes)],
            env=environment,
            check=True,
            timeout=120,
            capture_output=True,
        )
        weights.append(torch.load(path, weights_only=True))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)
