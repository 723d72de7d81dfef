"""Which setting a misspelt or former name was meant to be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

# What people write, and the name of the setting.
ALIASES = {
    **dict.fromkeys(("lambda", "lamda", "strength"), "watermark.strength"),
    "epochs": "trainer.max_epochs",
    "max_epochs": "trainer.max_epochs",
    "lr": "optimizer.lr",
    "bits": "key.n_bits",
    "kee": "key",
    "dataset": "data",
    "batch_size": "data.module.batch_size",
    # Former names.
    "normalised": "normalized",
    **{
        name: f"watermark.{name}"
        for name in ("objective", "engine", "cadence", "n_images", "momentum", "n_val_images")
    },
    **dict.fromkeys(
        ("schedule", *(f"schedule.{name}" for name in ("strength", "warmup_steps", "start_epoch"))),
        "watermark.strength",
    ),
    **{
        f"cadence.{name}": "watermark.cadence"
        for name in ("every_n_steps", "max_backoff", "max_hurry", "growth")
    },
    "objective.margin": "watermark.objective",
    # One value each, unless a configuration gives them a `_target_`.
    **{
        f"watermark.cadence.{name}": "watermark.cadence"
        for name in ("every_n_steps", "max_backoff", "max_hurry", "growth")
    },
    "watermark.objective.margin": "watermark.objective",
}


def suggestion(command: str, overrides: list[str], key: str) -> str:
    """Return a sentence that names the setting meant by ``key``, or where the settings are listed.

    Args:
        command: the command.
        overrides: its command line.
        key: a name that the configuration does not have.
    """
    keys = sorted(set(_all_keys(command, overrides, key)))
    if key in ALIASES and ALIASES[key] in keys:
        return f" Did you mean `{ALIASES[key]}`?"
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if not close and not key.startswith("hydra."):
        leaves = {name.split(".")[-1]: name for name in reversed(keys)}
        close = [
            leaves[leaf] for leaf in difflib.get_close_matches(key.split(".")[-1], leaves, n=1, cutoff=0.7)
        ]
    if close:
        return f" Did you mean `{close[0]}`?"
    return f" `gradsigns {command} --help` lists the settings."


def _all_keys(command: str, overrides: list[str], wrong: str) -> Iterator[str]:
    """Yield the dotted keys of the configuration that the other words compose, or of the default one."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from gradsigns_lightning.runs.config import config_folder

    if command == "train":
        yield from ("experiment", "debug")  # groups without a default, absent unless chosen
    choices = [o for o in overrides if re.fullmatch(r"\w+=\w+", o) and o.partition("=")[0] != wrong]
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_folder(), version_base="1.3"):
        for chosen in (choices, []):
            try:
                yield from _walk(compose(command, overrides=chosen))
            except Exception:  # noqa: S112  (other words of the command line may be wrong as well)
                continue
            return


def _walk(config: Any, prefix: str = "") -> Iterator[str]:
    from omegaconf import OmegaConf

    for name in config:
        yield f"{prefix}{name}"
        is_open = OmegaConf.is_missing(config, name) or OmegaConf.is_interpolation(config, name)
        if not is_open and OmegaConf.is_dict(config[name]):
            yield from _walk(config[name], f"{prefix}{name}.")
