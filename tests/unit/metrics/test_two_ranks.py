"""Two gloo processes produce the embedding gradients and metrics of one process with all the data."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "two_ranks_worker.py"
ROOT = Path(__file__).parents[3]
_spec = importlib.util.spec_from_file_location("two_ranks_worker", SCRIPT)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of each rank; the two processes run once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.run(
        [sys.executable, SCRIPT, folder],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("objective", ["margin", "paper"])
@pytest.mark.parametrize("split", worker.SPLITS)
def test_averaged_gradients_are_those_of_one_process(ranks, split, objective):
    expected = worker.embedding_gradients(
        worker.target_images(sum(worker.SPLITS[split])), objective, world_size=1
    )
    for rank in ranks:
        torch.testing.assert_close(rank[f"{split}/{objective}"], expected)
    moved = sum(float(g.abs().sum()) for g in expected[1:])
    assert (moved == 0) == (split == "both_empty")


@pytest.mark.parametrize("name", worker.METRICS)
def test_metrics_of_two_ranks_are_those_of_one_process(ranks, name):
    metric = worker.METRICS[name]()
    for i in range(6):
        metric.update(*worker.metric_inputs(name, i))
    for rank in ranks:
        torch.testing.assert_close(rank[name], [metric.compute()])
