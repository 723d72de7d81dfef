"""The benchmarks run, and the documents state what they measured."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cost():
    return importlib.import_module("cost")


@pytest.fixture(scope="module")
def measured():
    return json.loads((ROOT / "docs" / "cost.json").read_text())


def test_signing_needs_hardly_more_memory_and_the_published_recipe_twice_as_much(cost):
    unmarked, signed, published = (
        cost.peak_bytes(cost.WORKLOADS[0], side) for side in ("unmarked", "signed", "published")
    )
    assert signed < 1.05 * unmarked
    assert published > 2 * unmarked


def test_share_of_the_training(cost):
    share = cost.embedding_share(cost.WORKLOADS[0], cost.Cadence(5), 10)
    assert 0 < share["buffer"] < share["embedding_pass"] < 0.5


def test_cost_of_an_embedding_step_does_not_grow_with_the_batch(cost):
    studies = {"batch size": [(n, {"shape": (1, 28, 28), "batch": n}) for n in (32, 512)]}
    small, large = cost.scaling(n_rounds=5, studies=studies)["batch size"].values()
    assert large["ordinary"] > 4 * small["ordinary"]
    assert large["embedding"] < 2 * small["embedding"]


def test_plot_is_the_one_of_the_figures(cost, measured, tmp_path):
    cost.plot(measured, tmp_path / "cost.svg")
    drawn, shipped = (
        re.findall(r"<text [^>]*>(.*?)</text>", path.read_text())
        for path in (tmp_path / "cost.svg", ROOT / "docs" / "cost.svg")
    )
    assert drawn == shipped != []


def test_document_states_the_measured_ratios(measured):
    rows = [line for line in (ROOT / "docs" / "cost.md").read_text().splitlines() if line.startswith("| ")]
    for kind, field in (("time", "time_ratio"), ("peak memory", "memory_ratio")):
        for side in ("signed", "published"):
            row = next(line for line in rows if line.startswith(f"| {kind}, {side}"))
            for cell, results in zip(row.split("|")[2:4], measured["overhead"].values(), strict=True):
                ratio = results[field][side]
                assert f"{ratio['median'] if kind == 'time' else ratio:.3f}" in cell
