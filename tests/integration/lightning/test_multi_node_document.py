"""The script of docs/multi-node.md runs as it stands, under torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from gradsigns_lightning import WatermarkKey, verify
from gradsigns_lightning.data import Digits
from gradsigns_lightning.models import MLP

DOCUMENT = Path(__file__).parents[3] / "docs" / "multi-node.md"


def test_the_documented_script_signs_under_torchrun(tmp_path):
    (script,) = re.findall(r"<!-- train.py -->\n```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    data = Digits()
    key = WatermarkKey.generate(
        "Acme Vision",
        32,
        input_shape=(1, 8, 8),
        target_class=0,
        input_mean=data.mean,
        input_std=data.std,
        secret=bytes(range(32)),
    )
    key.save(tmp_path / "acme.gskey")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "PL_", "SLURM_"))} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "train.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bit error rate 0.0" in done.stdout
    state = torch.load(tmp_path / "signed.ckpt", weights_only=True)["state_dict"]
    net = MLP((1, 8, 8), 10)
    net.load_state_dict({k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")})
    assert verify(net, key, data.raw_images("test", 0)).p_value < 1e-6
