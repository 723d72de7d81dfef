"""A command that is started in a received folder reads only the files there that it is given."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from gradsigns_lightning import WatermarkKey, __version__
from gradsigns_lightning.lazy import as_command, in_pythons_folder
from gradsigns_lightning.models import MLP
from gradsigns_lightning.runs.checkpoint import describe

ROOT = Path(__file__).parents[2]
CACHE = "cache"  # where numba would keep, and read, what it compiled


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "gradsigns_lightning", *words]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.fixture
def folder(tmp_path):
    """A folder in which matplotlib waits forever for its settings, and numba can store its pickles."""
    WatermarkKey.generate("A", 128, input_shape=(1, 28, 28), target_class=0).save(tmp_path / "master.gskey")
    key = WatermarkKey.generate(
        "A", 32, input_shape=(1, 8, 8), target_class=0, input_mean=0.305, input_std=0.376
    )
    key.save(tmp_path / "digits.gskey")
    model = {
        "_target_": "gradsigns_lightning.models.MLP",
        "input_shape": [1, 8, 8],
        "n_classes": 10,
        "hidden": [16],
    }
    data = {"name": "digits", "n_classes": 10, "input_shape": [1, 8, 8], "mean": [0.305], "std": [0.376]}
    weights = {f"net.{name}": value for name, value in MLP((1, 8, 8), 10, [16]).state_dict().items()}
    torch.save(
        {"state_dict": weights, "hyper_parameters": describe(model, data, key.commitment)},
        tmp_path / "digits.ckpt",
    )
    os.mkfifo(tmp_path / "matplotlibrc")
    (tmp_path / ".numba_config.yaml").write_text(f"cache_dir: {CACHE}\n")
    return tmp_path


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("keygen", "master=master.gskey", "message=hi", "out=copy.gskey"), 0),
        (("verify", "checkpoint=none.ckpt", "key=master.gskey", "images=."), 1),
        (("trace", "onnx=none.onnx", "key=master.gskey", "images=."), 1),
        (("judge", "bundle=none.gsbundle"), 1),
        (("verify", "checkpoint=digits.ckpt", "key=digits.gskey"), 3),
        (("verify", "checkpoint=digits.ckpt", "key=digits.gskey", "data=digits"), 3),
    ],
    ids=lambda words: words[0] if isinstance(words, tuple) else "",
)
def test_no_settings_are_read_from_a_received_folder(folder, words, code):
    done = run(folder, *words)
    assert done.returncode == code, done.stderr
    assert not (folder / CACHE).exists()


def test_the_traps_hold_whoever_opens_them(folder):
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", "import matplotlib"], cwd=folder, timeout=10, check=False)
    (folder / "compiling.py").write_text(
        "import numba\n\n\n@numba.njit(cache=True)\ndef same(x):\n    return x\n\n\nsame(1)\n"
    )
    subprocess.run([sys.executable, "compiling.py"], cwd=folder, timeout=100, check=True)
    assert (folder / CACHE).exists()


def test_no_module_of_a_received_folder_is_run(tmp_path):
    for name in ("torch", "typing", "numpy", "hydra"):
        (tmp_path / f"{name}.py").write_text("open('done', 'w').close()\n")
    done = run(tmp_path, "keygen", "owner=A", "out=a.gskey")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.gskey").exists()
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "words", [("-mgradsigns_lightning",), ("-m", "gradsigns_lightning.__main__"), ("-Bmgradsigns_lightning",)]
)
def test_no_module_of_a_received_folder_is_run_however_python_is_told(tmp_path, words):
    (tmp_path / "typing.py").write_text("open('done', 'w').close()\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words, "keygen", "owner=A", "data=digits", "out=a.gskey"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "done").exists()


def test_nothing_is_imported_before_the_current_folder_is_left(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def python(module: str, *words: str) -> str:
        start = [sys.executable, "-m", module, *words]
        return subprocess.run(
            start, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    (tmp_path / "empty.py").write_text("import sys; print(*sys.modules)\n")
    # the others Python itself has loaded by then
    for name in sys.stdlib_module_names - set(python("empty").split()):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module in the current folder')\n")
    assert python("gradsigns_lightning", "--version").strip().endswith(__version__)


def command(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `gradsigns` as the console script does."""
    program = "import sys; del sys.path[0]; from gradsigns_lightning.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    start = [sys.executable, "-c", program, *words]
    return subprocess.run(
        start, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False
    )


TRAIN = (
    "train",
    "data=digits",
    "model=mlp",
    "key=b32",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "progress=false",
)
SPAWN = ("trainer.strategy=ddp_spawn", "trainer.devices=2", "hydra.run.dir=run")


@pytest.mark.timeout(400)
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 knows no PYTHONSAFEPATH")
def test_no_process_that_a_command_starts_runs_a_module_of_a_received_folder(tmp_path):
    for name in ("multiprocessing", "joblib", "typing"):
        (tmp_path / f"{name}.py").write_text(f"open('done_{name}', 'w').close()\nraise SystemExit\n")
    done = command(tmp_path, *TRAIN, *SPAWN)
    assert done.returncode == 0, done.stderr
    sweep = (
        "keygen",
        "-m",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "owner=A,B",
        "data=digits",
        "out=${owner}.gskey",
    )
    done = command(tmp_path, *sweep)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in tmp_path.glob("*.gskey")) == ["A.gskey", "B.gskey"]
    assert list(tmp_path.glob("done_*")) == []


@pytest.mark.parametrize("file", ["matplotlibrc", ".numba_config.yaml", "wandb/settings"])
def test_processes_that_would_read_settings_there_are_refused(tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("")
    done = command(
        tmp_path,
        *TRAIN,
        *SPAWN,
        *(["logger=wandb", "logger.offline=true"] if file == "wandb/settings" else []),
    )
    assert done.returncode == 1
    assert f"others would read {file} in the current folder" in done.stderr


class Listener(BaseHTTPRequestHandler):
    """Records what is sent to it."""

    def do_POST(self):
        self.server.seen.append(self.headers.get("Authorization"))
        self.send_error(401)

    def do_GET(self):
        self.do_POST()

    def log_message(self, *_):
        pass


@pytest.fixture
def listener():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def wandb_settings(folder: Path, listener: ThreadingHTTPServer) -> dict[str, str]:
    """Write settings of W&B that name the listener, and return the variables of a user who has an API key."""
    (folder / "wandb").mkdir()
    (folder / "wandb" / "settings").write_text(
        f"[default]\nbase_url = http://127.0.0.1:{listener.server_port}\n"
    )
    own = folder.parent / "home"
    own.mkdir()
    nowhere = "http://127.0.0.1:9"  # otherwise a real server would be contacted
    return {"WANDB_API_KEY": "0123456789" * 4, "HOME": str(own), "WANDB_INIT_TIMEOUT": "5"} | {
        "NOWHERE": nowhere
    }


@pytest.mark.timeout(200)
def test_no_settings_of_wandb_are_read_from_a_received_folder(tmp_path, listener):
    pytest.importorskip("wandb")
    folder = tmp_path / "received"
    folder.mkdir()
    variables = wandb_settings(folder, listener)
    (tmp_path / "home" / ".config" / "wandb").mkdir(parents=True)
    (tmp_path / "home" / ".config" / "wandb" / "settings").write_text(
        f"[default]\nbase_url = {variables.pop('NOWHERE')}\n"
    )
    done = command(folder, *TRAIN, "logger=wandb", "logger.offline=true", "hydra.run.dir=run", **variables)
    assert done.returncode == 0, done.stderr
    assert "wandb/settings in the current folder" in " ".join(done.stderr.split())
    assert list((folder / "run" / "wandb").glob("offline-run-*"))
    done = command(folder, *TRAIN, "logger=wandb", "hydra.run.dir=online", **variables)
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stdout + done.stderr  # the user's own settings are read
    target = "logger._target_=lightning.pytorch.loggers.wandb.WandbLogger"  # the same class
    done = command(folder, *TRAIN, "logger=wandb", target, "hydra.run.dir=again", **variables)
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stdout + done.stderr
    assert listener.seen == []


def test_wandb_itself_reads_them(tmp_path, listener):
    pytest.importorskip("wandb")
    folder = tmp_path / "received"
    folder.mkdir()
    variables = wandb_settings(folder, listener)
    del variables["NOWHERE"]
    program = "import wandb; print(wandb.setup().settings.base_url)"
    environment = {**os.environ, **variables}
    start = [sys.executable, "-c", program]
    done = subprocess.run(
        start, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip().endswith(f":{listener.server_port}")


def test_a_library_call_leaves_the_current_folder_alone(tmp_path, monkeypatch):
    """Other threads of the caller's process may be using it."""
    monkeypatch.chdir(tmp_path)
    moved = []
    monkeypatch.setattr(os, "chdir", moved.append)
    with in_pythons_folder():
        pass
    assert moved == []
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with as_command(), in_pythons_folder():
        assert Path.cwd() == Path(sys.prefix)
    assert Path.cwd() == tmp_path
    assert os.environ.get("PYTHONSAFEPATH") is None
