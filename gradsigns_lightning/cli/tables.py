"""The table that a command prints and the JSON object that it writes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradsigns_lightning.cli.terminal import for_cell, for_stream
from gradsigns_lightning.core.utils.files import atomic_write
from gradsigns_lightning.core.utils.text import printable, printable_lines

if TYPE_CHECKING:
    from gradsigns_lightning.core.result import ReadingResult
    from gradsigns_lightning.verification import TraceResult

_STYLES = {"owned": "bold green", "not_proven": "bold yellow", "inconclusive": "bold red"}
_FRAME = 7  # columns of a table's lines and of the blanks beside them
_sweep: ContextVar[bool] = ContextVar("_sweep", default=False)


@contextmanager
def sweep() -> Iterator[None]:
    """Print no table within except that of :func:`print_cells`: nobody reads hundreds of tables."""
    token = _sweep.set(True)
    try:
        yield
    finally:
        _sweep.reset(token)


def in_sweep() -> bool:
    """Tell whether this is one run of many, which reports its result in one line."""
    return _sweep.get()


def print_rows(rows: dict[str, str], *, title: str, note: str = "") -> None:
    """Print a table of names and values, except in a sweep; nothing is cut off where there is no terminal.

    Everything is made :func:`printable`, and nothing is read as rich's markup: names and values may come from
    anyone.
    """
    if in_sweep():
        return
    console = Console(highlight=False)
    shown = [(_cell(name, console), _cell(value, console)) for name, value in rows.items()]
    table = Table(title=Text(printable(title), style="table.title"), show_header=False, title_justify="left")
    # A control's name is its file's, which on a terminal must leave room for the values.
    table.add_column(
        overflow="fold", max_width=max(console.width // 2 - _FRAME, 1) if console.is_terminal else None
    )
    table.add_column(overflow="fold")
    for name, value in shown:
        # an owner may be called "owned"
        style = _STYLES.get(value.replace(" ", "_"), "") if name == "verdict" else ""
        table.add_row(Text(name), Text(value, style=style))
    if not console.is_terminal:
        needed = sum(max(map(cell_len, column)) for column in zip(*shown, strict=True)) + _FRAME
        console = Console(highlight=False, width=max(console.width, needed))
    console.print(table)
    if note:
        say(note)


def _cell(text: str, console: Console) -> str:
    return for_cell(printable(text), console.width // 2 - _FRAME) if console.is_terminal else printable(text)


def say(text: str) -> None:
    """Print a message as :func:`printable_lines`, in lines that fit the terminal."""
    console = Console(highlight=False)
    console.print(Text(for_stream(printable_lines(text), console.file)), soft_wrap=True)


def print_cells(cells: list[dict[str, str]]) -> None:
    """Print a table with a line for each run of a sweep, named by what differs in their command lines."""
    words = [cell["run"].split(", ") for cell in cells]
    common = set.intersection(*map(set, words))
    rows = [
        {**cell, "run": " ".join(w for w in run if w not in common)}
        for cell, run in zip(cells, words, strict=True)
    ]
    console = Console(highlight=False)
    table = Table(title="all runs", title_justify="left", title_style="table.title")
    names = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    for name in names:
        table.add_column(Text(_cell(name, console)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(row.get(name, ""), console)) for name in names))
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, 200))
    console.print(table)


def short_path(path: str | Path) -> str:
    """Return ``path`` relative to the current folder if it is below it; resolved if a link leads out."""
    try:
        shorter = Path(path).relative_to(Path.cwd())
    except ValueError:
        return str(path)
    place = Path(path).resolve()
    return str(shorter) if place.is_relative_to(Path.cwd().resolve()) else str(place)


def verification_rows(result: ReadingResult, *, n_key_bits: int = 0) -> dict[str, str]:
    """Return the rows of a reading; one through an API may have fewer groups than the key has bits."""
    groups = f", groups of the key's {n_key_bits} bits" if result.n_bits < n_key_bits else ""
    free = {"free choice": _free_choice(result)} if result.free_bits > 0 else {}
    return {
        "verdict": result.verdict.replace("_", " "),
        "matching bits": matches(result) + groups,
        "bit error rate": f"{result.bit_error_rate:.4f}",
        "p-value": f"{format_p_value(result)} (owned at <= {result.alpha:g})",
        **free,
        "smallest margin": f"{result.margin:+.3f}",
        **_what_was_read(result),
    }


def _what_was_read(result: ReadingResult) -> dict[str, str]:
    """Return the row that says how much was read: images, or an API's responses to queries."""
    from gradsigns_lightning.verification import ApiVerificationResult

    if not isinstance(result, ApiVerificationResult):
        return {"images read": str(result.n_queries)}
    images = f"{result.n_images} image{'s' * (result.n_images != 1)}"
    read_as = f"answers read as {result.answers or 'nothing'}"
    return {"queries": f"{result.n_queries}, probes around {images}, {read_as}"}


def _free_choice(result: ReadingResult) -> str:
    """Return what the verdict is worth to anyone who does not know when the payload was chosen."""
    charged = result.log10_charged_p_value
    found = (
        "nothing" if math.isnan(charged) else "owned" if charged <= math.log10(result.alpha) else "not proven"
    )
    return (
        f"{result.free_bits:g} bits were up to whoever made the key and may have fitted them to this model: "
        f"charged for them, as by `gradsigns judge`, p = {power(charged)} ({found})"
    )


def as_sentence(text: str) -> str:
    """Return ``text`` with a full stop, unless it ends like a sentence."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


def power(log10: float) -> str:
    """Format a p-value given by its base-10 logarithm, since a double may underflow."""
    return f"10^{log10:.1f}" if log10 <= -300 else f"{10**log10:.3g}"


def matches(result: ReadingResult | TraceResult) -> str:
    """Return how many of the decided bits match, in words."""
    decided = result.n_bits - result.n_erasures
    return f"{result.n_matches} of {decided}" + (
        f" ({result.n_erasures} erased)" if result.n_erasures else ""
    )


def format_p_value(result: ReadingResult | TraceResult) -> str:
    """Format a result's p-value, by its logarithm where a double underflows."""
    if result.p_value > 0 or math.isnan(result.p_value):
        return f"{result.p_value:.3g}"
    return f"10^{result.log10_p_value:.1f}"


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write ``content`` as one JSON object, atomically; non-finite numbers become null.

    Raises:
        ValueError: the folder does not exist or cannot be written to.
    """
    check_json_path(path)
    text = json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"
    atomic_write(path, text.encode(), argument="json", overwrite=True, mode=0o644)


def check_json_path(path: str | None) -> None:
    """Raise a ``ValueError`` if no file can be written at ``path``: before hours of training, not after."""
    if path is None:
        return
    target = Path(path).expanduser()
    if not target.parent.is_dir() or target.is_dir():
        raise ValueError(f"`json` must name a file in an existing folder, got {path!r}.")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"`json` must name a file in a folder that can be written to, got {path!r}.")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
