"""What README, docs and `--help` show works as shown: commands, the README's code, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from gradsigns_lightning import verify
from gradsigns_lightning.cli.dispatch import COMMANDS
from gradsigns_lightning.cli.examples import EXAMPLES
from gradsigns_lightning.cli.file_names import with_file_names, with_key_file
from gradsigns_lightning.core.objective import make_objective
from gradsigns_lightning.runs.build import build, to_plain
from gradsigns_lightning.runs.config import config_folder, register_schemas

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(document: Path) -> list[str]:
    """Return the lines of a document's code blocks that run `gradsigns`, without comments.

    A backslash continues a line.
    """
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if re.match(r"gradsigns \w", line)]


COMMAND_LINES = sorted(
    {line for document in DOCUMENTS for line in commands_of(document)}
    | {f"gradsigns {command} {words}" for command, examples in EXAMPLES.items() for words in examples}
)


def choices(word: str) -> list[str]:
    """Return the words into which a sweep expands one."""
    name, _, values = word.partition("=")
    return (
        [word]
        if "," not in values or values[:1] in "[\"'"
        else [f"{name}={value}" for value in values.split(",")]
    )


def configurations(line: str):
    """Yield the configuration of each run of a command line."""
    _, command, *words = shlex.split(line)
    assert command in COMMANDS
    runs: list[list[str]] = [[]]
    for word in words:
        if word not in ("-m", "--multirun"):
            runs = [[*run, choice] for run in runs for choice in choices(word)]
    register_schemas()
    for run in runs:
        GlobalHydra.instance().clear()
        spaced = [f"{n}='{v}'" if " " in v else word for word in run for n, _, v in [word.partition("=")]]
        with initialize_config_dir(config_folder(), version_base="1.3"):
            words = [with_file_names(word) for given in spaced for word in with_key_file(command, given)]
            yield command, compose(command, overrides=[*words, "paths.output_dir=."])


def test_there_are_commands():
    assert {line.split()[1] for line in COMMAND_LINES} == set(COMMANDS)
    assert len(COMMAND_LINES) > 35


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_documented_command_line_is_understood(line):
    for command, config in configurations(line):
        if command in ("train", "keygen") and not config.get("master") and not config.key.get("path"):
            assert_can_be_embedded(command, config)


def assert_can_be_embedded(command: str, config) -> None:
    """Check that a key that an example makes can be embedded and owned.

    It must fit the example's training, or one with the defaults.
    """
    names = ("owner", "scope", "target_class", "payload", "message")
    settings = (
        {name: None if name == "message" else config[name] for name in names} if command == "keygen" else {}
    )
    for name, value in settings.items():
        config[name] = value
    key = build(to_plain(config.key), option="key")
    objective = config.watermark.objective if command == "train" else "margin"
    make_objective(objective, key).check_key(key)
    assert key.n_bits >= 30


CONFIGURATION = sorted(Path(config_folder()).rglob("*.yaml"))


@pytest.mark.parametrize("document", [*DOCUMENTS, *CONFIGURATION], ids=lambda path: path.stem)
def test_a_shell_leaves_documented_settings_as_they_are(document):
    """In double quotes or none, `${...}` and `$images` would be the shell's, which has no such variables."""
    text = document.read_text()
    broken = re.findall(r"""[\w.]+="[^"\n]*\$[^"\n]*"|\b[\w.]+=[^'"\s`]*\$\{[^\n`]*""", text)
    assert broken == []


def anchors(document: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    for link in links:
        name, _, anchor = link.partition("#")
        if "://" not in link:
            target = document.parent / name if name else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


class Net(LightningModule):
    """A newcomer's module: batches ``(x, y)``, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def test_the_readmes_first_code_runs_as_printed(tmp_path, monkeypatch):
    """It gets only what its reader has: a model, its data, images of the class and an API."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    digits = load_digits()
    images = nn.functional.interpolate(
        torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], 28, mode="bilinear"
    )
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.3, random_state=0, stratify=labels)
    model = Net()
    given = {
        "model": model,
        "datamodule": LightningDataModule.from_datasets(
            TensorDataset(images[train], labels[train]), batch_size=64
        ),
        "images": images[test][labels[test] == 0],
        "predict": lambda probes: model(probes).softmax(dim=1),
    }
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    exec(code, given)
    assert given["result"].verdict == "owned", given["result"]
    assert verify(model, given["key"], given["images"]).verdict == "owned"
