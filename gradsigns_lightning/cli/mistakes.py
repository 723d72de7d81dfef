"""Mistakes in a command line that Hydra would not find, or would report in words about Python.

They are found before Hydra reads the words.
"""

from __future__ import annotations

import re
from pathlib import Path

from gradsigns_lightning.cli.suggest import ALIASES

_NO_CHOICE = re.compile(r"null|true|false|[+-]?[0-9.]+|\[.*\]", re.IGNORECASE)


def with_dashes(command: str, words: list[str]) -> str:
    """Return a message about a setting written as an option, ``--key FILE``; empty if there is none."""
    from dataclasses import fields

    from gradsigns_lightning.runs.config import SCHEMAS

    settings = {entry.name for entry in fields(SCHEMAS[command])} | set(ALIASES) | {"experiment", "debug"}
    for word, following in zip(words, [*words, ""][1:], strict=True):
        name, _, value = word.partition("=")
        setting = name[2:].replace("-", "_")
        if name.startswith("--") and (setting in settings or "." in setting):
            value = value or (
                following if following and following[0] != "-" and "=" not in following else "..."
            )
            named = ALIASES.get(setting, setting)
            return f"settings are written without dashes: `{named}={value}`, got {word!r}."
    return ""


def one_file_for_all_runs(words: list[str]) -> str:
    """Return a message if the runs of a sweep would overwrite each other's results, else nothing."""
    results = [word for word in words if word.startswith("json=") and not {"$", ","} & set(word)]
    if not results or not {"-m", "--multirun"} & set(words):
        return ""
    return (
        f"the runs of a sweep would all write to one file, got {results[0]!r}: put a setting into its name, "
        "as in json='out_${seed}.json' (in a shell with the single quotes)."
    )


def no_choice(words: list[str]) -> str:
    """Return a message about a word that selects no option of its group; empty if there is none.

    Hydra's own message would be about Python's types.
    """
    from gradsigns_lightning.runs.config import config_folder

    for word in words:
        group, _, value = word.partition("=")
        folder = Path(config_folder(), group)
        if group.isidentifier() and folder.is_dir() and _NO_CHOICE.fullmatch(value):
            options = sorted(file.stem for file in folder.glob("*.yaml"))
            meant = {"true": "default", "false": "none", "null": "none"}.get(value.lower())
            hint = f" Did you mean `{group}={meant}`?" if meant in options else ""
            return f"`{group}` must be one of {', '.join(options)}, got {value}.{hint}"
    return ""
