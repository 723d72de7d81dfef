"""The collusion benchmark counts correctly.

Members are found and innocents are not, though they would be if the code were linear.
"""

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.data import Digits
from gradsigns_lightning.models import MLP

ROOT = Path(__file__).parents[2]
SMALL = {"runs": 10, "customers": 1000, "seed": "test"}


@pytest.fixture(scope="module")
def collusion():
    return importlib.import_module("collusion")


@pytest.fixture
def linear_code(monkeypatch):
    """Give customers the words of a linear code, as the signatures once were."""

    def signatures(key, n_customers):
        digits = (np.arange(n_customers)[:, None] >> np.arange(16)) & 1
        generator = np.random.default_rng(0).integers(2, size=(16, key.n_bits))
        return (digits @ generator % 2).astype(np.uint8)

    monkeypatch.setattr(WatermarkKey, "customer_signatures", signatures)


def test_a_copy_is_named_two_are_found_and_five_are_not(collusion):
    alone, two, five = (collusion.simulated(128, "weak", "average", size, **SMALL) for size in (1, 2, 5))
    assert (alone["runs"], alone["named"], alone["members found"], alone["mixed"]) == (10, 10, 10, 0)
    assert (two["named"], two["mixed"]) == (0, 10)
    assert two["present"] >= 5
    assert five["nobody"] >= 8
    assert collusion.simulated(256, "weak", "average", 3, **SMALL)["present"] == 10


def test_no_mixture_finds_an_innocent(collusion):
    counts = [
        collusion.simulated(64, noise, mixture, size, **{**SMALL, "runs": 4})
        for noise in collusion.NOISES
        for mixture in collusion.MIXTURES
        for size in (2, 3, 5)
    ]
    everything = collusion.added(counts)
    assert everything["runs"] == 4 * 2 * 3 * len(collusion.MIXTURES)
    assert everything["innocent present"] == everything["innocent named"] == 0


@pytest.mark.parametrize(("mixture", "bits"), [("minority", 128), ("A + B - C, its signs", 256)])
def test_with_a_linear_code_the_same_count_finds_innocents(collusion, linear_code, mixture, bits):
    # The sum of three words is a customer's: the minority is that very word, and A + B - C agrees with it in
    # 3 of 4 bits.
    counts = collusion.simulated(bits, "weak", mixture, 3, **{**SMALL, "customers": 1024})
    assert counts["innocent present"] >= 4
    assert counts["innocent named"] == (10 if mixture == "minority" else 0)


def test_innocents_in_random_mixtures_keep_alpha(collusion):
    (present, named), (rarely, _), never = collusion.null_runs(
        128, runs=1000, customers=500, seed="test"
    ).values()
    assert named <= present
    assert binom.sf(present - 1, 1000, 1e-2) > 1e-3
    assert binom.sf(rarely - 1, 1000, 1e-3) > 1e-3
    assert never == [0, 0]


def test_with_a_linear_code_random_mixtures_exceed_alpha(collusion, linear_code):
    (present, _), (rarely, _), (at_1e_9, _) = collusion.null_runs(
        128, runs=300, customers=512, seed="test"
    ).values()
    assert binom.sf(present - 1, 300, 1e-2) < 1e-6
    assert rarely > 5
    assert at_1e_9 > 0


def test_the_quick_search_finds_the_innocents_of_the_decoder(collusion):
    rng, alpha, found = np.random.default_rng(0), 0.3, 0
    master = collusion.master_key(64, rng)
    signs, master_signs = 2.0 * master.customer_signatures(300) - 1, 2.0 * master.signature.numpy() - 1
    readings = [collusion.null_reading(signs, master_signs, rng) for _ in range(100)]
    quick = collusion.clearest(readings, master, 300, members_too=False)
    for reading, value in zip(readings, quick, strict=True):
        present = collusion.traced(reading, master, 300, alpha)["innocent present"]
        assert present == (value <= np.log10(alpha))
        found += present
    assert 10 < found < 50


def test_nobody_is_missed_for_being_thought_far(collusion, monkeypatch):
    monkeypatch.setattr(collusion, "ALPHAS", (0.3, 0.05))
    settings = {"runs": 100, "customers": 100, "seed": "test"}

    def count():
        members = collusion.simulated(128, "weak", "average", 3, **settings)["members found"]
        return collusion.null_runs(64, **settings), members

    innocents, members = count()
    monkeypatch.setattr(collusion, "clearest", lambda readings, *_, **__: [-np.inf] * len(readings))
    assert count() == (innocents, members)
    assert innocents["0.3"] > innocents["0.05"] > [0, 0]
    assert 10 < members < 290


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_where_all_copies_agree_every_mixture_keeps_the_bit(collusion, size):
    rng = np.random.default_rng(size)
    copies = rng.choice([-1.0, 1.0], (size, 400))
    agreed = (copies == copies[0]).all(0)
    assert agreed.any()
    for mix in collusion.MIXTURES.values():
        assert (np.sign(mix(copies, rng))[agreed] == copies[0][agreed]).all()
    assert collusion.one_subtracted(size).sum() == pytest.approx(1)
    assert collusion.some_negative(size, rng).sum() == pytest.approx(1)


def run_main(collusion, monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["collusion.py", *map(str, words)])
    collusion.main()
    return capsys.readouterr().out


def test_finished_cells_are_kept_and_not_run_again(collusion, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        collusion, "MIXTURES", {name: collusion.MIXTURES[name] for name in ("average", "minority")}
    )
    simulate = ("simulate", "--out", tmp_path / "s.json", "--bits", 64, "--runs", 2, "--customers", 50)
    null = ("null", "--out", tmp_path / "n.json", "--bits", 64, "--runs", 150, "--customers", 50)
    first = [run_main(collusion, monkeypatch, capsys, *command) for command in (simulate, null)]
    assert "| average | 100 % (100 %) |" in first[0]
    assert "Innocents present: 0, named: 0, of 36 runs." in first[0]
    assert "| 64 | 0.01 | 150 | 1.5 |" in first[1]
    cells = json.loads((tmp_path / "s.json").read_text())
    assert len(cells) == 2 * (1 + 2 * 4)
    for name in ("simulated", "null_runs"):
        monkeypatch.setattr(collusion, name, lambda *_, **__: pytest.fail("a finished cell is run again"))
    second = [run_main(collusion, monkeypatch, capsys, *command) for command in (simulate, null)]
    assert [text[text.index("\n|") :] for text in first] == [text[text.index("\n|") :] for text in second]


def test_trained_copies_are_mixed_judged_and_kept(collusion, monkeypatch, tmp_path):
    data = Digits(batch_size=64)
    network = partial(MLP, input_shape=data.input_shape, n_classes=10, hidden=(64,))
    monkeypatch.setattr(collusion, "NETWORKS", {"mlp": network})
    monkeypatch.setattr(
        collusion, "TRAININGS", {"base": (5, 3e-3), "copy": (10, 3e-3), "fine-tuned": (1, 1e-3)}
    )
    copies = collusion.Copies("mlp", 44, tmp_path, data)
    copy = copies.judged("copy", [777])
    assert (copy["customer"], copy["members"]) == (777, [777])
    assert copy["accuracy"] > 0.9
    assert copy["innocents"] > -4
    mixture = copies.judged("average, fine-tuned", [777, 1234])
    assert mixture["n_matches"] < copy["n_matches"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mlp-44-1234.pt",
        "mlp-44-777.pt",
        "mlp-base.pt",
    ]
    states = [copies.state("copy", [customer]) for customer in (777, 1234)]
    first, *_, last = states[0]
    assert torch.equal(copies.state("A + B - C", [777, 1234])[last], 2 * states[0][last] - states[1][last])
    layered = copies.state("layer by layer", [777, 1234])
    assert torch.equal(layered[first], states[0][first])
    assert torch.equal(layered[last], states[1][last])
    row = collusion.summary(
        "average", 2, [{**mixture, "present": [777, 0], "customer": 0, "verdict": "owned"}]
    )
    assert row[4:8] == [1, 0, "1 of 2", 2]


def test_the_plan_of_the_trained_copies(collusion):
    plan = list(collusion.Copies("mlp", 128, Path(), None).plan(5))
    assert plan[0] == ("base", [])
    assert sum(kind == "copy" for kind, _ in plan) == 5
    # as many as it has layers
    assert max(len(members) for kind, members in plan if kind == "layer by layer") == 3
    assert len({(kind, tuple(members)) for kind, members in plan}) == len(plan)
    for kind in ("average", "A + B - C"):
        assert (
            {len(m) for k, m in plan if k == kind}
            == {len(m) for k, m in plan if k == f"{kind}, fine-tuned"}
            == {2, 3, 4, 5}
        )
