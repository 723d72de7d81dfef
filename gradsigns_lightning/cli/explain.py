"""Turns an error of Hydra or of this package into one message and an exit code."""

from __future__ import annotations

import difflib
from typing import Any

from gradsigns_lightning.cli.suggest import suggestion
from gradsigns_lightning.runs.options import without_overrides

# Distribution to import name to extra, for what is not always installed.
_EXTRAS = {
    "wandb": "wandb",
    "torchvision": "vision",
    "PIL": "vision",
    "hydra_plugins": "sweep",
    "joblib": "sweep",
}
# Examples of what to give where the configuration leaves a value open.
_TO_GIVE = {
    "data.n_classes": ("NUMBER", "the data set's number of classes"),
    "data.module.root": ("FOLDER", "the data set's folder"),
    "data.input_shape": ("[3,32,32]", "channels, height and width of an image"),
    **{
        f"data.{name}": ("[0.5,0.5,0.5]", "how the batches are normalized, for each channel")
        for name in ("mean", "std")
    },
    "data.module._target_": ("package.module.Data", "your LightningDataModule"),
    "model._target_": ("package.module.Net", "your network"),
    "protocol.request": ("'{inputs: $images}'", "what is sent, with $images where the images go"),
}
_KINDS = {"IntegerNode": "an integer", "FloatNode": "a number", "BooleanNode": "true or false"}
BAD_COMMAND_LINE, FAILED = 2, 1


def explain(command: str, overrides: list[str], error: BaseException) -> tuple[str, int]:
    """Return a message for the user and the exit code.

    Args:
        command: the command that failed.
        overrides: its command line.
        error: what was raised.
    """
    from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    from gradsigns_lightning.runs.build import MissingValueError
    from gradsigns_lightning.runs.config import UnknownKeyError

    if isinstance(error, MissingConfigException):
        return _unknown_option(error), BAD_COMMAND_LINE
    if isinstance(error, (ConfigCompositionException, OverrideParseException)):
        return _bad_override(command, overrides, error), BAD_COMMAND_LINE
    if isinstance(error, UnknownKeyError):
        return _unknown_key(command, overrides, error.key), BAD_COMMAND_LINE
    if isinstance(error, MissingValueError):
        return _missing(command, [key.removesuffix(".path") for key in error.keys]), BAD_COMMAND_LINE
    if isinstance(error, OmegaConfBaseException):
        return _bad_value(command, error), BAD_COMMAND_LINE
    if isinstance(error, ImportError):
        return _missing_package(error), FAILED
    if type(error).__name__ == "ProcessRaisedException":  # of a spawned process; its message is a traceback
        return str(error).strip().splitlines()[-1], FAILED
    return without_overrides(str(error)) or type(error).__name__, FAILED


def _missing(command: str, names: list[str]) -> str:
    from dataclasses import fields

    from gradsigns_lightning.runs.config import SCHEMAS

    settings = {
        entry.name: (entry.metadata.get("value"), entry.metadata.get("text"))
        for entry in fields(SCHEMAS[command])
    }
    known = [(_TO_GIVE | settings).get(name, ("", "")) for name in names]
    example = " ".join(f"{name}={value or '...'}" for name, (value, _) in zip(names, known, strict=True))
    text = (known[0][1] or "").partition(" (must be given")[0] if len(names) == 1 else ""
    listed = " and ".join(f"`{name}`" for name in names)
    return f"{listed} must be given, as in `{example}`{text and ': '}{text}."


def _unknown_option(error: Any) -> str:
    missing, options = error.missing_cfg_file or "", list(error.options or [])
    group, _, option = missing.rpartition("/")
    if group == "hydra/launcher" and option == "joblib":
        return (
            "`hydra/launcher=joblib` needs a package that is not installed: pip install "
            "'gradsigns-lightning[sweep]'."
        )
    if not options:
        return _first_line(error)
    close = difflib.get_close_matches(option, options, n=1)
    hint = f" Did you mean `{group}={close[0]}`?" if close else ""
    return f"`{group}` must be one of {', '.join(options)}, got {option!r}.{hint}"


def _bad_override(command: str, overrides: list[str], error: BaseException) -> str:
    from hydra.errors import OverrideParseException
    from omegaconf import DictConfig
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, ValidationError

    cause: Any = error.__cause__ or error.__context__  # for an error in a file, Hydra sets no cause
    if isinstance(error, OverrideParseException):
        name, equals, value = str(error.override).partition("=")
        if not equals:
            return (
                f"settings are written as name=value, got {name!r}. `gradsigns {command} --help` lists them."
            )
        hint = "In a shell, put values with blanks, braces or $ in single quotes."
        return f"`{name}` cannot be read, got {value!r}. {hint}"
    if isinstance(cause, ValidationError) and (kind := _KINDS.get(type(cause.child_node).__name__)):
        return f"`{cause.full_key}` must be {kind}, got {str(cause.value)!r}."
    if isinstance(cause, ValidationError) and cause.full_key and isinstance(cause.parent_node, DictConfig):
        return (
            f"`{cause.full_key}` is a group of settings and cannot be one value, as a configuration file has "
            f"it. To choose one of its options write `override /{cause.full_key}: NAME` under `defaults`."
        )
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.full_key:
        return _unknown_key(command, overrides, cause.full_key.partition("@")[0])
    return ": ".join(_first_line(e) for e in (error, cause) if e is not None)


def _unknown_key(command: str, overrides: list[str], key: str) -> str:
    hint = suggestion(command, overrides, key)
    return f"there is no `{key}` in the configuration of `gradsigns {command}`.{hint}"


def _bad_value(command: str, error: Any) -> str:
    from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

    key, text = error.full_key, _first_line(error)
    if isinstance(error, (MissingMandatoryValue, InterpolationToMissingValueError)):
        return _missing(command, [str(key)])
    return f"`{key}`: {text}" if key else text


def _missing_package(error: ImportError) -> str:
    text = _first_line(error)
    if "gradsigns-lightning[" in text:
        return text
    name = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(name) or next((extra for package, extra in _EXTRAS.items() if package in text), None)
    return f"{text} It comes with pip install 'gradsigns-lightning[{extra}]'." if extra else text


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
