from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gradsigns_lightning
from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.cli import main
from gradsigns_lightning.integration.logging import _SUMMARIES
from gradsigns_lightning.integration.reading import METRICS
from gradsigns_lightning.runs.fit import _FINAL

QUICK = [
    "data=digits",
    "model=mlp",
    "trainer.accelerator=cpu",
    "progress=false",
    "trainer.max_epochs=1",
    "logger=none",
]


def test_a_sweep_over_key_sizes_and_strengths(capsys):
    words = [
        "key=b32,b64",
        "watermark.strength=0.3,1",
        "watermark.objective=paper",
        "json=out_${key.n_bits}_${watermark.strength}.json",
    ]
    assert main(["train", "-m", *QUICK, *words, "hydra.sweep.dir=sweep"]) == 0
    found = {path.name: json.loads(path.read_text())["n_bits"] for path in Path().glob("out_*.json")}
    assert found == {"out_32_0.3.json": 32, "out_32_1.json": 32, "out_64_0.3.json": 64, "out_64_1.json": 64}
    keys = {WatermarkKey.load(path).commitment for path in Path("sweep").glob("*/key.gskey")}
    assert len(keys) == 4  # every job has a key of its own
    table = capsys.readouterr().out.partition("all runs")[2].splitlines()
    lines = [line for line in table if "key=b" in line]
    shown = [re.sub(r"[ \u2502]+", " ", line).strip() for line in lines]
    runs = [
        "key=b32 watermark.strength=0.3",
        "key=b32 watermark.strength=1",
        "key=b64 watermark.strength=0.3",
        "key=b64 watermark.strength=1",
    ]
    assert [line.startswith(run) for line, run in zip(shown, runs, strict=True)] == [True] * 4
    assert all(re.search(r" of (32|64) \S+ \d+\.\d\d%$", line) for line in shown)
    assert "verdict" in "".join(table)


def test_a_run_of_a_sweep_prints_one_line(capsys):
    words = [word for word in QUICK if word != "progress=false"]
    assert main(["train", "-m", *words, "key=b32", "seed=0,1", "twin=true", "hydra.sweep.dir=sweep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines].index("all runs") == 2
    verdict = "(not proven|owned|inconclusive)"
    found = rf"{verdict}, matching bits \d+ of 32, p-value \S+, accuracy \S+%, twin's accuracy \S+%"
    for seed, line in enumerate(lines[:2]):
        assert re.fullmatch(rf"#{seed} seed={seed}: {found}", line)
    assert main(["train", *words, "key=b32", "hydra.run.dir=run"]) == 0
    assert "training the signed model: MLP on digits" in (printed := capsys.readouterr().out)
    assert "\u2502 key file" in printed  # a single run has its table


def test_commands_without_a_verdict_print_a_line_too(capsys):
    assert (
        main(["keygen", "-m", "owner=A,B", "data=digits", "out='${owner}.gskey'", "hydra.sweep.dir=sweep"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    digests = [WatermarkKey.load(f"{owner}.gskey").commitment for owner in "AB"]
    assert lines[:2] == [
        f"#{i} owner={'AB'[i]}: key file {'AB'[i]}.gskey, key's commitment {digests[i]}" for i in (0, 1)
    ]
    assert main(["commit", "-m", "key=A.gskey,B.gskey", "hydra.sweep.dir=sweep"]) == 0
    assert capsys.readouterr().out.startswith(
        "#0 key.path=A.gskey: commitment file A.commitment.json, time-stamp not yet\n#1 "
    )


def test_a_failing_job_fails_the_sweep(capsys):
    assert main(["train", "-m", *QUICK, "key=b32,b256", "hydra.sweep.dir=sweep"]) == 1
    shown = capsys.readouterr()
    assert "`key.n_bits` must be at most" in shown.err
    assert "\n#1 key=b256: failed\n" in shown.out
    lines = [
        re.sub(r"[ \u2502]+", " ", line).strip()
        for line in shown.out.partition("all runs")[2].splitlines()
        if "key=" in line
    ]
    assert [line.split()[:2] for line in lines] == [["key=b32", lines[0].split()[1]], ["key=b256", "failed"]]
    assert lines[0].endswith("%")


def test_the_runs_of_a_sweep_do_not_write_over_each_others_results(capsys):
    assert main(["train", "-m", *QUICK, "seed=0,1", "json=out.json"]) == 2
    assert (
        "got 'json=out.json': put a setting into its name, as in json='out_${seed}.json'"
        in capsys.readouterr().err
    )
    assert list(Path().iterdir()) == []


def test_the_joblib_launcher(capsys):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = [
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=1",
        "seed=0,1",
        "key=b32",
        "json=out_${seed}.json",
    ]
    assert main(["train", "-m", *QUICK, *words, "hydra.sweep.dir=sweep"]) == 0
    assert [json.loads(Path(f"out_{seed}.json").read_text())["seed"] for seed in (0, 1)] == [0, 1]
    table = capsys.readouterr().out.partition("all runs")[2]
    assert "seed=0" in table
    assert "seed=1" in table


def test_the_csv_logger_writes_the_figures():
    words = ["logger=csv", "key=b32", "hydra.run.dir=run"]
    assert main(["train", *QUICK, *words]) == 0
    header = Path("run/logs/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"wm/ber", "wm/p_value", "val/acc", "time/seconds_per_epoch"} <= set(header)
    assert WatermarkKey.load("run/key.gskey").commitment in Path("run/logs/hparams.yaml").read_text()


def test_an_offline_wandb_run_prints_one_line(tmp_path):
    pytest.importorskip("wandb")
    words = [*QUICK, "logger=wandb", "logger.offline=true", "key=b32", "hydra.run.dir=run"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    root = str(Path(gradsigns_lightning.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "gradsigns_lightning", "train", *words],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if re.search("wandb|W&B", line)]
    assert len(lines) == 1
    assert lines[0].startswith("W&B run, offline: wandb sync run/wandb/offline-run-")


def test_log10_comes_before_the_p_value():
    assert METRICS.index("log10_p_value") < METRICS.index("p_value")
    assert list(_SUMMARIES) == list(METRICS)
    assert _FINAL.index("log10_p_value") < _FINAL.index("p_value")


def test_an_offline_wandb_run_has_the_commitment_and_not_the_secret(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(["train", *QUICK, "logger=wandb", "logger.offline=true", "key=b32", "hydra.run.dir=run"]) == 0
    key = WatermarkKey.load("run/key.gskey")
    files = [file for file in Path("run").rglob("*") if file.is_file() and file.suffix != ".gskey"]
    record = next(file for file in files if file.suffix == ".wandb")
    end = time.monotonic() + 60  # wandb's own process writes it, on a busy machine after the run is finished
    while key.commitment.encode() not in record.read_bytes() and time.monotonic() < end:
        time.sleep(0.1)
    assert key.commitment.encode() in record.read_bytes()
    assert b"watermark" in record.read_bytes()  # the configuration is there
    secret = key._secret.reveal()
    for file in files:
        content = file.read_bytes()
        assert secret not in content, file
        assert secret.hex().encode() not in content, file
