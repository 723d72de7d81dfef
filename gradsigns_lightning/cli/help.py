"""The text of ``gradsigns COMMAND --help``.

It is made from the schema and the configuration files, without importing Hydra and torch.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from gradsigns_lightning.cli.examples import EXAMPLES
from gradsigns_lightning.runs.config import SCHEMAS, config_folder

# The most used settings of the components; `--cfg job` shows all.
_DATA = {"paths.data": "folder of data sets; also set by the variable GRADSIGNS_DATA"}
_PARTS = {
    "train": {
        **_DATA,
        "data.module.batch_size": "images in a batch",
        "optimizer.lr": "learning rate",
        "key.n_bits": "bits of a new key",
        "key.n_carriers": "inputs that carry them; by default six a bit, or all",
        "key.target_class": "class whose images carry the mark",
        "watermark.strength": "length of the mark's gradient relative to the task's; 0: unsigned",
        "watermark.objective": "objective of the mark: margin or paper",
        "watermark.cadence": "steps from one embedding step to the next; by default they follow the training",
        "watermark.n_images": "images of the class in one embedding step",
        "watermark.momentum": "share of earlier embedding steps in the gradient that the objective sees",
        "watermark.n_val_images": "held-out images on which a validation reads the mark; 0 for none",
        "watermark.engine": (
            "second derivatives: auto, double_backward, forward_over_reverse or finite_difference"
        ),
        "trainer.max_epochs": "epochs",
        "trainer.accelerator": "auto, cpu or gpu",
        "trainer.precision": "32-true, bf16-mixed, ...",
    },
    "keygen": {
        "key.n_bits": "any other number of bits",
        "key.n_carriers": "inputs that carry them; by default six a bit, or all",
    },
    **dict.fromkeys(("benchmark",), _DATA),
    "attack": {
        **_DATA,
        "recipe.rate": "learning rate of a training from scratch",
        "recipe.batch_size": "images in a batch",
    },
    **dict.fromkeys(("verify", "trace", "judge"), _DATA),
}
# Placeholders for values that the component determines itself.
_FOUND = {"paths.data": "FOLDER", "key.n_carriers": "NUMBER", "watermark.cadence": "NUMBER"}
# Options of a group that are for other commands, or for the user's own projects.
_OTHERS = {
    **dict.fromkeys(("keygen", "benchmark"), ("file",)),
    "train": ("gradsigns",),
    **dict.fromkeys(("verify", "trace", "judge"), ("own",)),
}
_UNUSED = {
    "report": ("data",),
    "commit": ("data", "api.journal"),
    "strip": ("data",),
    "import-2021": ("data",),
}
_MOST_LISTED = 20
_FOOT = """\
Options:
  -m, --multirun  run every combination of comma-separated values
  --cfg job       print the whole configuration and do nothing; --hydra-help lists Hydra's own options

Exit codes: 0 owned or done, 1 an error, 2 a wrong command line, 3 not proven, inconclusive or only claimed.\
"""


def help_text(command: str, summary: str) -> str:
    """Return the help of a command.

    Args:
        command: its name.
        summary: what it does, in a few words.
    """
    lines = list(_settings(command))
    width = max(len(name) for name, _ in lines) + 2
    columns = max(shutil.get_terminal_size((130, 24)).columns, 80)
    shown = [_line(f"  {name:<{width}}", text, columns) for name, text in lines]
    examples = [f"  gradsigns {command} {words}" for words in EXAMPLES[command]]
    heads = [
        f"Usage: gradsigns {command} [setting=value ...]\n\n{summary[0].upper()}{summary[1:]}.\n\nSettings:"
    ]
    return "\n".join([*heads, *shown, "\nExamples:", *examples, "", _FOOT])


def _line(start: str, text: str, columns: int) -> str:
    return textwrap.fill(
        text, columns, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
    )


def _settings(command: str) -> Iterator[tuple[str, str]]:
    """Yield every setting, with its default or a placeholder, and its line of help."""
    choices = _choices(command)
    for entry in fields(SCHEMAS[command]):
        for name, text in _setting(entry, choices, "", _OTHERS.get(command, ())):
            if name.partition("=")[0] not in _UNUSED.get(command, ()):
                yield name, text
    if command == "train":
        yield "experiment=NAME", f"a whole recipe: {', '.join(_options('experiment'))}"
        yield "debug=NAME", f"settings for debugging: {', '.join(_options('debug'))}"
    for name, text in _PARTS.get(command, {}).items():
        default = _part(name, choices)
        yield _with_value(name, _FOUND.get(name) if default is None else default), text


def _setting(
    entry: Field[Any], choices: dict[str, str | None], prefix: str, others: Sequence[str]
) -> Iterator[tuple[str, str]]:
    default = entry.default if entry.default_factory is MISSING else entry.default_factory()
    if is_dataclass(default):
        for inner in fields(default):
            yield from _setting(inner, choices, f"{entry.name}.", others)
        return
    if "text" not in entry.metadata:
        return
    text, value = entry.metadata["text"], entry.metadata["value"]
    if entry.name in choices:
        options = [option for option in _options(entry.name) if option not in others]
        yield f"{entry.name}={choices[entry.name] or value}", f"{text}: {_listed(options)}"
    elif isinstance(default, list) and default:
        yield f"{prefix}{entry.name}=[{','.join(default)}]", text
    else:
        yield _with_value(f"{prefix}{entry.name}", value or default), text


def _with_value(name: str, value: Any) -> str:
    shown = (
        {None: "VALUE", True: "true", False: "false"}.get(value, value)
        if isinstance(value, (bool, type(None)))
        else value
    )
    return f"{name}={shown:g}" if isinstance(shown, float) else f"{name}={shown}"


def _listed(options: Sequence[str]) -> str:
    """Return the choices of a group; of the attacks, which fill a page, some."""
    if len(options) <= _MOST_LISTED:
        return ", ".join(options)
    return f"ftal, prune_90, ... ({len(options)} in docs/attacks.md)"


def _choices(command: str) -> dict[str, str | None]:
    """Return the configuration groups of a command and the option that each takes by default."""
    entries = _read(f"{command}.yaml")["defaults"]
    groups = {name: option for entry in entries if isinstance(entry, dict) for name, option in entry.items()}
    return {name: option for name, option in groups.items() if not name.startswith("override ")}


def _options(group: str) -> list[str]:
    return sorted(file.stem for file in (Path(config_folder()) / group).glob("*.yaml"))


def _part(name: str, choices: dict[str, str | None]) -> Any:
    """Return the default of a component's setting, or None if the component determines it itself."""
    group, *keys = name.split(".")
    if group == "paths":
        # Commands that reach a verdict read only folders that the user names.
        return "data" if "trainer" in choices else None
    value: Any = _read(f"{group}/{choices[group]}.yaml")
    for key in keys:
        value = value[key]
    return value


def _read(name: str) -> Any:
    import yaml

    return yaml.safe_load((Path(config_folder()) / name).read_text(encoding="utf-8"))
