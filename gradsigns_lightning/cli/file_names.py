"""Names of files and folders, on a command line and in a configuration.

Names are taken literally, because a stranger may have chosen them (in those of new files, settings are
replaced), and none may be blank. ``key=FILE`` is short for a setting of the group ``key``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gradsigns_lightning.runs.build import MissingValueError
from gradsigns_lightning.runs.config import config_folder

FILE_ARGUMENTS = (
    "checkpoint",
    "onnx",
    "images",
    "bundle",
    "controls",
    "key",
    "key.path",
    "init",
    "attach",
    "authority",
    "signer",
    "commitment",
    "folder",
    "mean_image",
    "master",
    "api.journal",
    "paths.data",
    "data.module.root",
    "code",
)
NEW_FILES = ("out", "json")  # in a sweep, their names may contain a setting's value
_KEY_FILE_COMMANDS = ("verify", "trace", "commit", "attack")
_FOLDERS = ("images", "folder", "paths.data", "data.module.root", "code")
_REFERENCE = re.compile(r"(\\*)\$(?=\\?\{)")  # Hydra takes the backslash out of "$\{"
_SETTING = r"\{(?:(?:hydra:)?[A-Za-z_][\w.]*|now:[^{}$]*)\}"
_OTHER_REFERENCE = re.compile(rf"(\\*)\$(?=\\?\{{)(?!{_SETTING})")


def with_key_file(command: str, word: str) -> list[str]:
    """Return what ``key=FILE`` and ``key.path=FILE`` are short for.

    To Hydra, ``key=...`` selects an option of the group ``key``.
    """
    name, _, value = word.partition("=")
    if command in _KEY_FILE_COMMANDS and name == "key":
        return [f"key.path={value}"]
    if command == "train" and (name == "key.path" or (name == "key" and _is_key_file(value))):
        return ["key=file", f"key.path={value}"]
    return [word]


def _is_key_file(value: str) -> bool:
    is_choice = Path(config_folder(), "key", f"{value}.yaml").is_file()
    return value.endswith(".gskey") or (not is_choice and Path(value).expanduser().is_file())


def expand_key(command: str, config: Any) -> None:
    """Let ``key: FILE`` in a configuration mean what ``key=FILE`` does on the command line."""
    from omegaconf import OmegaConf

    if command in ("train", *_KEY_FILE_COMMANDS) and isinstance(config.get("key"), str):
        config.key = OmegaConf.merge(
            OmegaConf.load(Path(config_folder(), "key", "file.yaml")), {"path": config.key}
        )


def with_file_names(word: str) -> str:
    """Escape the references in ``checkpoint=FILE`` and the like: a file's name may be a stranger's choice.

    Otherwise ``${oc.env:NAME}`` in it would be replaced by what it refers to, and end up in a message or a
    report, or at the server of an ``endpoint``. In the names of new files only settings are replaced, as in
    ``json=out_${seed}.json``.
    """
    name, equals, value = word.partition("=")
    argument = name.lstrip("+")
    if argument not in (*FILE_ARGUMENTS, *NEW_FILES, "endpoint"):
        return word
    reference = _OTHER_REFERENCE if argument in NEW_FILES else _REFERENCE
    # OmegaConf takes an odd number of backslashes as an escape; outside quotation marks Hydra halves their
    # number first.
    value = reference.sub(lambda found: "\\" * (4 * ((len(found[1]) + 1) // 2) + 1) + "$", value)
    return name + equals + _quoted(value)


def _quoted(value: str) -> str:
    """Quote what Hydra cannot read unquoted: `epoch=9-step=990.ckpt`, as Lightning names its checkpoints."""
    if "=" not in value or value[0] in "'\"[" or {"'", '"'} <= set(value):
        return value
    mark = '"' if "'" in value else "'"
    return ",".join(mark + part + mark for part in value.split(","))


def check_names(config: Any) -> None:
    """Refuse blank names of files and folders, which an unset variable in a script leads to.

    A blank name would mean the current folder, which may be a received one. `paths.data`, which a variable
    can set, is checked where the images are read.
    """
    from omegaconf import OmegaConf

    of_paths = {"paths.data"}
    module = _selected(config, "data.module")
    if OmegaConf.is_dict(module) and "root" in module and OmegaConf.is_interpolation(module, "root"):
        of_paths.add("data.module.root")
    for argument in (*FILE_ARGUMENTS, *NEW_FILES):
        value: Any = None if argument in of_paths else _selected(config, argument)
        for name in list(value) if OmegaConf.is_list(value) else [value]:
            if isinstance(name, str) and not name.strip():
                _refuse_name(argument, name)


def _refuse_name(argument: str, name: str) -> None:
    """Raise for a blank name; if no word of the command line sets it, it was left for the user to give."""
    from hydra.core.hydra_config import HydraConfig

    if not any(word.lstrip("+").startswith(f"{argument}=") for word in HydraConfig.get().overrides.task):
        raise MissingValueError([argument])
    kind = "folder" if argument in _FOLDERS else "file"
    raise ValueError(f"`{argument.removesuffix('.path')}` must name a {kind}, got {name!r}.")


def _selected(config: Any, argument: str) -> Any:
    """Return what ``argument`` names, or None if the command has no such setting or it cannot be resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.select(config, argument)
    except OmegaConfBaseException:
        return None
