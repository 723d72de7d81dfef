"""The table of docs/support.md: what works and what is refused; no cell hangs or is silently wrong.

GRADSIGNS_WRITE_DOCS=1 pytest tests/integration/lightning/test_support_table.py    writes the tables again.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support_cells import MODELS, as_if_sharded, run_cell

DOCUMENT = Path(__file__).parents[3] / "docs" / "support.md"
ENGINES = ("double_backward", "forward_over_reverse", "finite_difference")
PRECISIONS = ("64-true", "bf16-mixed", "bf16-true")
DISTRIBUTED = (
    "ddp",
    "ddp_find_unused_parameters_true",
    "ddp, static graph",
    "fsdp (FSDP1)",
    "fsdp (FSDP1), layers wrapped apart",
    "ModelParallelStrategy (FSDP2)",
    "ModelParallelStrategy, tensor parallel",
)
RELU_NET, TRANSFORMER = "CNN, GroupNorm, ReLU", "transformer, fused attention"

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]


def shown(result):
    """Return the cell's text.

    What embeds must be read without a wrong bit, by the callback and from the weights.
    """
    if result["outcome"].startswith("refused: "):
        return result["outcome"]
    assert result["outcome"] == "BER 0"
    assert result["logged"] == 0
    return "BER 0"


def table(header, rows):
    """Return a Markdown table whose refusals are numbered, and the refusals."""
    reasons, lines = [], [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        cells = []
        for cell in row:
            if cell.startswith("refused: "):
                cell = re.sub("engine '[a-z_]+': ", "", cell)  # the column says which
                reasons += [cell] if cell not in reasons else []
                cell = f"refused ({reasons.index(cell) + 1})"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return lines, [f"{i}. {reason.removeprefix('refused: ')}" for i, reason in enumerate(reasons, 1)]


def compare(name, header, rows):
    """Compare a table with the one in the document.

    The wording of the reasons is left out, because it is torch's in part.
    """
    lines, reasons = table(header, rows)
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(start)
    documented, _, after = rest.partition(end)
    if os.environ.get("GRADSIGNS_WRITE_DOCS"):
        body = "\n".join(["", "", *lines, "", *reasons, *([""] if reasons else []), ""])
        DOCUMENT.write_text(f"{before}{start}{body}{end}{after}")
        return
    assert [line for line in documented.splitlines() if line.startswith("|")] == lines


def test_models_and_engines():
    rows = []
    for model in MODELS:
        results = [run_cell(model, engine) for engine in (*ENGINES, "auto")]
        cells = [shown(result) for result in results]
        if "engine" in results[-1]:
            cells[-1] = results[-1]["engine"]
        rows.append([model, *cells])
    compare("models", ["model", *ENGINES, "auto takes"], rows)


def test_precisions_and_engines():
    rows = []
    for precision in PRECISIONS:
        for model in (RELU_NET, TRANSFORMER):
            rows.append(
                [precision, model, *(shown(run_cell(model, engine, precision)) for engine in ENGINES)]
            )
    compare("precisions", ["precision", "model", *ENGINES], rows)


def run_distributed(folder, n_processes, cells):
    """Run the cells in processes that are started as torchrun starts them; killed as a whole if they hang."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "SLURM_"))} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(n_processes),
        "LOCAL_WORLD_SIZE": str(n_processes),
        "TORCHELASTIC_RUN_ID": "cells",
        "GROUP_RANK": "0",
    }
    worker = Path(__file__).with_name("support_worker.py")
    processes = []
    for rank in range(n_processes):
        with (folder / f"log{rank}").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(worker), str(folder), json.dumps(cells)],
                    env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), "\n".join(
        (folder / f"log{rank}").read_text()[-3000:] for rank in range(n_processes)
    )
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(len(cells))]


@pytest.fixture(scope="module")
def one_process():
    """Weights of the same training in one process, which sees the whole batch.

    They are kept by model, and by whether it embeds as if sharded.
    """
    weights = {
        (model, False): run_cell(model, "double_backward")["weights"] for model in (RELU_NET, TRANSFORMER)
    }
    with as_if_sharded():
        return weights | {
            (model, True): run_cell(model, "auto")["weights"] for model in (RELU_NET, TRANSFORMER)
        }


def sharded(strategy):
    return "fsdp" in strategy or "FSDP" in strategy


def assert_same_weights(result, reference):
    for name, expected in reference.items():
        torch.testing.assert_close(
            result["weights"][name], expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_strategies_and_engines_on_two_processes(tmp_path, one_process):
    cells = [[m, e, "32-true", s] for s in DISTRIBUTED for m in (RELU_NET, TRANSFORMER) for e in ENGINES]
    mixed = [[TRANSFORMER, "auto", "bf16-mixed", s] for s in DISTRIBUTED]
    results = run_distributed(tmp_path, 2, cells + mixed)
    rows = []
    for i in range(0, len(cells), len(ENGINES)):
        model, _, _, strategy = cells[i]
        row = results[i : i + len(ENGINES)]
        for engine, result in zip(ENGINES, row, strict=True):
            if "weights" in result and engine != "finite_difference":
                assert_same_weights(result, one_process[model, sharded(strategy)])
        rows.append([strategy, "32-true", model, *map(shown, row)])
    for (model, _, precision, strategy), result in zip(mixed, results[len(cells) :], strict=True):
        outcome = shown(result)
        auto = [outcome if result.get("engine") == e or outcome != "BER 0" else "" for e in ENGINES]
        rows.append([strategy, precision, model, *auto])
    compare("strategies", ["strategy", "precision", "model", *ENGINES], rows)


def test_four_processes_equal_one(tmp_path, one_process):
    cells = [
        [RELU_NET, "auto", "32-true", "ddp"],
        [RELU_NET, "auto", "32-true", "ModelParallelStrategy (FSDP2)"],
    ]
    for cell, result in zip(cells, run_distributed(tmp_path, 4, cells), strict=True):
        assert shown(result) == "BER 0"
        assert_same_weights(result, one_process[RELU_NET, sharded(cell[3])])
