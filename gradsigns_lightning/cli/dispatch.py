"""Finds the command that the first word of the command line names, and runs it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from gradsigns_lightning.lazy import as_command, in_pythons_folder

COMMANDS = {
    "keygen": "make a key file",
    "train": "train a classifier, sign it on the way, and read the signature back",
    "verify": "read a key from a checkpoint of `gradsigns train`, an ONNX file or a prediction API",
    "trace": "tell which customer's copy a model is",
    "commit": "write a key's public commitment and have it time-stamped",
    "judge": "check an evidence bundle and read the suspect",
    "strip": "copy a checkpoint without the entries that announce the mark",
    "attack": "attack a signed model, and see what is left of the mark",
    "benchmark": "attack watermarking schemes, and keep what is measured",
    "report": "write a page of what the benchmark measured",
    "import-2021": "read the authors' released model",
}

_HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``gradsigns``; by default those of this process.

    Returns:
        The exit code: 0, 1 when the command failed, 2 when the command line is wrong, 3 when a verdict is not
        ``owned``.
    """
    with _escape_unencodable(), as_command():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(words: list[str]) -> int:
    if words[:1] == ["help"] and len(words) > 1:
        words = [words[1], "--help"]
    if not words or words[0] in (*_HELP, "help"):
        _write(_usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from gradsigns_lightning import __version__

        _write(f"gradsigns-lightning {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(_unknown(words[0]), file=sys.stderr)  # noqa: T201
        return 2
    if any(word in _HELP for word in words[1:]):
        from gradsigns_lightning.cli.help import help_text

        _write(help_text(words[0], COMMANDS[words[0]]))
        return 0
    with in_pythons_folder():
        from gradsigns_lightning.cli.runner import run_command

    return run_command(words[0], words[1:])


@contextmanager
def _escape_unencodable() -> Iterator[None]:
    """Escape characters that the output's encoding lacks, so that no name can keep a judge from a verdict."""
    before = {stream: stream.errors for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")}
    for stream in before:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in before.items():
            with suppress(OSError, ValueError):  # a pipe's reader may be gone; Python reports that at exit
                stream.reconfigure(errors=errors)


def _usage() -> str:
    listing = "\n".join(f"  {name:<13}{text}" for name, text in COMMANDS.items())
    return (
        "Usage: gradsigns COMMAND [setting=value ...]\n\n"
        "Sign a classifier's input gradients while it trains, and prove later that the model is yours.\n\n"
        f"Commands:\n{listing}\n\n`gradsigns COMMAND --help` lists the settings of a command.\n\n"
        "Exit codes: 0 owned or done, 1 an error, 2 a wrong command line, 3 not proven, inconclusive or only "
        "claimed."
    )


def _unknown(word: str) -> str:
    close = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return f"gradsigns: there is no command {word!r}, only {', '.join(COMMANDS)}.{hint}"


def _write(text: str) -> None:
    print(text)  # noqa: T201
