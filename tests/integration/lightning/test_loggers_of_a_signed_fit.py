"""What loggers get: scalars, the public settings, bits and margins at the end; never the secret."""

import base64
import csv
import json
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from signed_digits import SECRET, Net, make_key, make_mark, make_trainer, train_loader, val_loader

pytestmark = pytest.mark.usefixtures("seeded")
SCALARS = {"wm/loss", "wm/ber", "wm/p_value", "wm/log10_p_value", "wm/margin"}


def fit(*loggers, mark=None, **settings):
    trainer = make_trainer(
        mark or make_mark(), logger=list(loggers), log_every_n_steps=2, **({"max_epochs": 2} | settings)
    )
    trainer.fit(Net(), train_loader(400), val_loader())
    return trainer


def all_bytes(folder):
    return b"\n".join(path.read_bytes() for path in Path(folder).rglob("*") if path.is_file())


def assert_only_the_commitment(folder):
    content = all_bytes(folder)
    assert make_key().commitment.encode() in content  # so the search can find something
    for form in (SECRET, SECRET.hex().encode(), base64.b64encode(SECRET)[:40], repr(SECRET)[2:-1].encode()):
        assert form not in content
    assert json.dumps(make_key().carriers.tolist()[:8])[1:-1].encode() not in content
    assert ",".join(map(str, make_key().signature.tolist()[:24])).encode() not in content


def test_csv_gets_scalars_and_settings(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= SCALARS
    assert sum(bool(row["wm/ber"]) for row in rows) == 2
    settings = (Path(logger.log_dir) / "hparams.yaml").read_text()
    assert f"wm/commitment: {make_key().commitment}" in settings
    assert "wm/n_bits: 32" in settings
    assert_only_the_commitment(tmp_path)


class Minimal(Logger):
    """All that Lightning requires of a logger; it has no `experiment`."""

    name, version = "minimal", 0

    def __init__(self):
        super().__init__()
        self.metrics, self.params = set(), {}

    def log_metrics(self, metrics, step=None):
        self.metrics |= set(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        self.params |= params


def test_several_loggers_one_of_which_has_no_experiment(tmp_path):
    minimal, second = Minimal(), CSVLogger(tmp_path)
    fit(minimal, second)
    assert minimal.metrics >= SCALARS
    assert minimal.params["wm/commitment"] == make_key().commitment
    assert (Path(second.log_dir) / "metrics.csv").exists()


class FakeExperiment:
    def __init__(self):
        self.histograms = []

    def add_histogram(self, name, values, step):
        self.histograms.append((name, values, step))


class WithExperiment(Minimal):
    experiment = None

    def __init__(self):
        super().__init__()
        self.experiment = FakeExperiment()
        self.tables = []

    def log_table(self, key, columns, data):
        self.tables.append((key, columns, data))


def test_tables_and_histograms_go_where_they_can():
    logger = WithExperiment()
    trainer = fit(logger)
    ((name, values, step),) = logger.experiment.histograms
    assert (name, values.shape, step) == ("wm/margins", (32,), trainer.global_step)
    ((key, columns, data),) = logger.tables
    assert (key, columns) == ("wm/bits", ["bit", "margin", "matches"])
    assert [row[0] for row in data] == list(range(32))
    assert 1 - sum(row[2] for row in data) / 32 == pytest.approx(float(trainer.callback_metrics["wm/ber"]))
    assert min(row[1] for row in data) == pytest.approx(
        float(trainer.callback_metrics["wm/margin"]), rel=1e-5
    )


def test_no_reading_no_table():
    logger = WithExperiment()
    fit(logger, mark=make_mark(n_val_images=0))
    assert not logger.tables
    assert not logger.experiment.histograms


def test_a_second_fit_without_a_reading_does_not_log_the_first_ones_bits():
    mark, logger = make_mark(), WithExperiment()
    fit(mark=mark)
    fit(logger, mark=mark, limit_val_batches=0)
    assert not logger.tables


def test_only_rank_zero_logs_tables():
    logger, mark = WithExperiment(), make_mark()
    trainer = make_trainer(mark, logger=logger, max_epochs=1)
    trainer.strategy.__class__ = type("Rank1", (type(trainer.strategy),), {"is_global_zero": False})
    trainer.fit(Net(), train_loader(100), val_loader())
    assert not logger.tables


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    fit(TensorBoardLogger(tmp_path))
    assert b"wm/margins" in all_bytes(tmp_path)
    assert_only_the_commitment(tmp_path)


class TestWandb:
    @pytest.fixture
    def run(self, tmp_path, monkeypatch):
        wandb = pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
        for name in ("WANDB_API_KEY", "WANDB_RUN_ID"):
            monkeypatch.delenv(name, raising=False)

        class Subclass(WandbLogger):
            """Users subclass it."""

        logger = Subclass(project="gradsigns-tests", save_dir=tmp_path, offline=True)
        run = logger.experiment
        defined, logged, define, log = [], {}, run.define_metric, run.log
        monkeypatch.setattr(
            run, "define_metric", lambda name, **kw: defined.append((name, kw)) or define(name, **kw)
        )
        monkeypatch.setattr(run, "log", lambda data, *a, **kw: logged.update(data) or log(data, *a, **kw))
        fit(logger)
        config = dict(run.config)
        summary = dict(run.summary)
        wandb.finish()
        yield tmp_path, defined, logged, config, summary
        wandb.teardown()

    def test_offline_run(self, run):
        folder, defined, logged, config, summary = run
        assert set(logged) >= SCALARS | {"wm/bits", "wm/margins"}
        assert set(summary) >= SCALARS
        assert dict(defined) == {
            "wm/ber": {"summary": "min"},
            "wm/p_value": {"summary": "min"},
            "wm/log10_p_value": {"summary": "min"},
            "wm/margin": {"summary": "max"},
        }
        assert config["wm/commitment"] == make_key().commitment
        assert config["wm/n_bits"] == 32
        assert len(logged["wm/margins"].histogram) > 1
        (table,) = Path(folder).rglob("media/table/**/*.table.json")
        content = json.loads(table.read_text())
        assert content["columns"] == ["bit", "margin", "matches"]
        assert len(content["data"]) == 32
        assert_only_the_commitment(folder)
