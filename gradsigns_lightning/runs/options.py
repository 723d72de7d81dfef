"""Puts errors of the package into the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsigns_lightning.core.utils.files import USER_ERRORS, error_about

if TYPE_CHECKING:
    from gradsigns_lightning.core.key import WatermarkKey


def spoken(message: str, names: Mapping[str, str]) -> str:
    """Return ``message`` with the Python arguments in backticks replaced by what the user typed."""
    named = re.compile(r"`(\w+)(=True|=False|=\d+|)`")
    return named.sub(lambda found: f"`{names.get(found[1], found[1])}{found[2].lower()}`", message)


def without_overrides(message: str) -> str:
    """Return a message of the callback without its advice to override methods: a command line cannot."""
    if "`GradSigns." not in message:
        return message
    message = re.sub(r"\(?Override `.*, or set (`n_val_images=0`)\.\)", r"Set \1.", message, flags=re.DOTALL)
    message = re.sub(r"; if it does, `GradSigns\.logits` must [^.]*", "", message)
    message = re.sub(r"(,? (or|and) |\s*)[Oo]verride `GradSigns\..*", "", message, flags=re.DOTALL)
    message = message.replace("`GradSigns.logits`", "`model`").replace(
        "`logits` must", "the logits of `model` must"
    )
    return message if message.endswith((".", "?", "!")) else f"{message}."


@contextmanager
def options(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors raised within name the options of the command line.

    Args:
        names: what a Python argument is called on the command line, as ``{"path": "key"}``.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        message = spoken(str(error), names)
        if type(error) not in USER_ERRORS or message == str(error):
            raise
        raise type(error)(message) from error


def load_key(path: Any) -> WatermarkKey:
    """Return the key in the file that ``key=`` names; a name of digits alone comes as a number.

    Raises:
        ValueError: there is no such file, or something other than a name was given.
    """
    if not isinstance(path, (str, int)):
        raise ValueError(f"`key` must name one key file (.gskey), got {'null' if path is None else path}.")
    # Imports numpy, for which the message about a misspelt word should not wait.
    from gradsigns_lightning.core.key.key import WatermarkKey

    with options({"path": "key"}):
        return WatermarkKey.load(str(path))


def argument_names(config: Mapping[str, Any], option: str) -> dict[str, str]:
    """Return the names on the command line of the arguments in a part of the configuration, nested ones too.

    Args:
        config: the part, in plain containers.
        option: its own name there.
    """
    names: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            names = argument_names(value, f"{option}.{name}") | names
        if name[0] != "_":
            names[name] = f"{option}.{name}"
    return names


def train_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the names on the command line of the arguments of a training's parts."""
    return argument_names(settings["data"]["module"], "data.module") | argument_names(
        settings["watermark"], "watermark"
    )


def api_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the names on the command line of the arguments of a reading through an API."""
    return {"path": "onnx", "url": "endpoint", "predict": "endpoint"} | {
        name: f"api.{name}" for name in settings["api"]
    }


def check_is_file(option: str, path: str, kind: str) -> None:
    """Raise a ``ValueError`` that says what ``path`` is if it is not a file."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise ValueError(
            f"`{option}` must name {kind}, got {path!r}, which is a folder.{_hugging_face(file, option)}"
        )
    if not file.is_file():
        raise error_about(file)(f"`{option}` must name {kind}, got {path!r}, which is not there.")


def _hugging_face(folder: Path, option: str) -> str:
    """Return how to verify a model that transformers saved; only transformers can build it."""
    if option != "checkpoint" or not (folder / "config.json").is_file():
        return ""
    return (
        " It looks like a Hugging Face model, which this command cannot build. In Python: model = "
        f"transformers.AutoModelForImageClassification.from_pretrained({str(folder)!r}); "
        "gradsigns_lightning.verify(model, key, images)."
    )
