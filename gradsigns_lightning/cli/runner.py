"""Runs a command under Hydra and turns an error into one message and an exit code."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradsigns_lightning.cli.explain import BAD_COMMAND_LINE, explain
from gradsigns_lightning.cli.file_names import check_names, expand_key, with_file_names, with_key_file
from gradsigns_lightning.cli.mistakes import no_choice, one_file_for_all_runs, with_dashes
from gradsigns_lightning.cli.terminal import for_stream
from gradsigns_lightning.core.utils.text import printable_lines
from gradsigns_lightning.lazy import as_command, in_pythons_folder
from gradsigns_lightning.runs.build import check_given
from gradsigns_lightning.runs.config import check_root_keys, config_folder, register_schemas

_FULL_ERROR = "HYDRA_FULL_ERROR"
_NOT_PROVEN = 3


@dataclass(frozen=True)
class Outcome:
    """What a command found.

    Attributes:
        verdict: the verdict of a command that reaches one, else None.
        bit_error_rate: what a sweep minimises, or None.
        cell: names and values of its line in a sweep's table.
    """

    verdict: str | None = None
    bit_error_rate: float | None = None
    cell: dict[str, str] = field(default_factory=dict)


class _Reported(SystemExit):
    """The message has been printed; only the exit code is left."""


def run_command(command: str, overrides: list[str]) -> int:
    """Run ``command`` with Hydra overrides and options; see :func:`gradsigns_lightning.cli.main`."""
    full_error = os.environ.get(_FULL_ERROR) == "1"
    if wrong := with_dashes(command, overrides) or one_file_for_all_runs(overrides):
        return _report(wrong, BAD_COMMAND_LINE)
    overrides = [with_file_names(word) for given in overrides for word in with_key_file(command, given)]
    if wrong := no_choice(overrides):
        return _report(wrong, BAD_COMMAND_LINE)
    try:
        with _process_state(command, overrides), _cells(overrides) as cells:
            task = Task(command, full_error=full_error, cells=cells, words=overrides)
            _hydra_main(task)()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        return _report("interrupted", 130)
    except Exception as error:
        if full_error:
            raise
        return _report(*explain(command, overrides, error))
    return task.exit_code


def _check_given(command: str, config: Any) -> None:
    from omegaconf import OmegaConf

    if command == "keygen":  # a key needs little of its data's configuration, and no owner if it has a master
        config = OmegaConf.masked_copy(config, ["out"] if config.master is not None else ["owner", "out"])
    check_given(config)


def _hydra_main(task: Task) -> Callable[[], None]:
    with in_pythons_folder():
        import hydra

    register_schemas()
    decorate = hydra.main(version_base="1.3", config_path=config_folder(), config_name=task.command)
    return decorate(task)  # type: ignore[no-any-return]


class Task:
    """The function that Hydra calls with the composed configuration, in this process or a launcher's.

    Args:
        command: the command.
        full_error: let errors through with their tracebacks.
        cells: folder in which the jobs of a sweep leave their results.
        words: the command line; settings with one value in it are the same in all jobs of a sweep.

    Attributes:
        exit_code: 3 if the command gave a verdict other than ``"owned"``, else 0; in a sweep always 0.
    """

    def __init__(
        self, command: str, *, full_error: bool, cells: Path | None = None, words: Sequence[str] = ()
    ) -> None:
        self.command = command
        self.fixed = {word.partition("=")[0] for word in words if not set(",(") & set(word)}
        self.cells = cells
        self.full_error = full_error
        self.exit_code = 0

    def __call__(self, config: Any) -> float | None:
        """Run the command; the return value is what a sweeper minimises."""
        with as_command():  # a launcher's process begins here
            return self._run(config)

    def _run(self, config: Any) -> float | None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        try:
            check_root_keys(self.command, config)
            expand_key(self.command, config)
            check_names(config)
            _check_given(self.command, config)
            if self.command == "judge" and HydraConfig.get().mode == RunMode.MULTIRUN:
                raise ValueError("`judge` gives one verdict and cannot be swept.")
            # torch and Lightning take seconds to import, and not every command line gets this far.
            with in_pythons_folder():
                quiet = importlib.import_module("gradsigns_lightning.cli.quiet").quiet
                run = importlib.import_module(f"gradsigns_lightning.cli.{self.command.replace('-', '_')}").run
            with (
                quiet(),
                importlib.import_module("gradsigns_lightning.cli.tables").sweep()
                if self.cells
                else nullcontext(),
            ):
                outcome: Outcome = run(config) or Outcome()
        except Exception as error:
            self._leave({"verdict": "failed"})
            # Otherwise Hydra adds lines of its own, which in a sweep tell which job failed.
            if self.full_error or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            raise _Reported(
                _report(*explain(self.command, HydraConfig.get().overrides.task, error))
            ) from error
        self._leave(outcome.cell)
        if outcome.verdict not in (None, "owned") and HydraConfig.get().mode != RunMode.MULTIRUN:
            self.exit_code = _NOT_PROVEN
        return outcome.bit_error_rate

    def _leave(self, cell: dict[str, str]) -> None:
        """Print the result of a sweep's run in a line, and leave it for the table at the end."""
        from hydra.core.hydra_config import HydraConfig

        if self.cells is not None:
            job = HydraConfig.get()
            words = [
                _without_secrets(word)
                for word in job.overrides.task
                if word.partition("=")[0] not in self.fixed
            ]
            found = (
                ", ".join(value if name == "verdict" else f"{name} {value}" for name, value in cell.items())
                or "done"
            )
            importlib.import_module("gradsigns_lightning.cli.tables").say(
                f"#{job.job.num} {' '.join(words)}: {found}"
            )
            cell = {"run": ", ".join(map(_without_secrets, job.overrides.task)), **cell}
            (self.cells / f"{int(job.job.num):06}.json").write_text(json.dumps(cell), encoding="utf-8")


def _without_secrets(word: str) -> str:
    """Return a word of the command line as a table shows it."""
    name, equals, value = word.partition("=")
    if name.lstrip("+") != "endpoint":
        return word
    address = value.strip("\"'")
    shown = importlib.import_module("gradsigns_lightning.oracles.http").without_credentials(address)
    return name + equals + str(shown)


@contextmanager
def _cells(overrides: list[str]) -> Iterator[Path | None]:
    """Make a folder for the results of a sweep's jobs, and print them as a table.

    The jobs may run in other processes.
    """
    if not {"-m", "--multirun"} & set(overrides):
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        finally:
            cells = [
                json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(folder).glob("*.json"))
            ]
            if len(cells) > 1:
                importlib.import_module("gradsigns_lightning.cli.tables").print_cells(cells)


@contextmanager
def _process_state(command: str, overrides: list[str]) -> Iterator[None]:
    """Let Hydra see this command line and raise its errors instead of printing them; restore both after."""
    argv, before = sys.argv, os.environ.get(_FULL_ERROR)
    sys.argv = [f"gradsigns {command}", *overrides]
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if before is None:
            os.environ.pop(_FULL_ERROR, None)
        else:
            os.environ[_FULL_ERROR] = before


def _report(message: str, code: int) -> int:
    print(for_stream(f"gradsigns: {printable_lines(message)}", sys.stderr), file=sys.stderr)  # noqa: T201
    return code
