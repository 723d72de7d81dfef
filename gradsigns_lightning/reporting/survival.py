"""Which marks survive which attacks: a page with a table and two figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from gradsigns_lightning.benchmark.cells import CellRecord
from gradsigns_lightning.benchmark.records import MOST_ACCURACY_LOST, AttackRecord, Point
from gradsigns_lightning.reporting.figures import evidence_against_accuracy, survival_curves

CURVES, SCATTER = "survival-curves.svg", "survival-evidence.svg"
_LOST, _KEPT, _DEAR, _NEVER = "🔴", "🟢", "🟡", "⚪"
_LEGEND = (
    f"{_KEPT} the mark is proven in every seed; {_LOST} the thief wins in at least one: the mark is not "
    f"proven any more, and accuracy fell by less than {100 * MOST_ACCURACY_LOST:g} points; {_DEAR} the mark "
    f"is not proven, but the thief's model has lost more than that; {_NEVER} in a seed the mark was not "
    "proven even before the attack. Each entry: log10 of the p-value, accuracy lost in points; mean and "
    "standard deviation over the seeds."
)


@dataclass(frozen=True)
class Group:
    """The records of one attack on one scheme, over seeds.

    Attributes:
        records: at least one.
    """

    records: tuple[AttackRecord, ...]

    @property
    def sign(self) -> str:
        """Whether the mark survives."""
        if any(record.wins for record in self.records):
            return _LOST
        if not all(record.before.reading.proven for record in self.records):
            return _NEVER
        return _KEPT if all(record.after.reading.proven for record in self.records) else _DEAR

    @property
    def text(self) -> str:
        """The entry of the table."""
        evidence = spread([record.after.reading.log10_p_value for record in self.records], "{:.1f}")
        lost = spread([100 * record.accuracy_lost for record in self.records], "{:+.1f}")
        return f"{self.sign} {evidence}; {lost}"


def survival_page(cells: Sequence[CellRecord], *, command: str = "") -> str:
    """Return the page in Markdown.

    Args:
        cells: the records.
        command: what made them, to be shown above the tables.

    Raises:
        ValueError: there is no record.
    """
    if not cells:
        raise ValueError("`folder` must hold records of `gradsigns benchmark`, got none.")
    parts = ["# Which marks survive which attacks", _LEGEND]
    if command:
        parts.append(f"Made by `{command}`.")
    for chosen, of_model in sorted(grouped(cells, ("data", "model", "with")).items()):
        parts += [f"## {', '.join(filter(None, chosen))}", _table(of_model)]
    parts += [
        f"![evidence along the dose of each attack]({CURVES})",
        f"![evidence against accuracy]({SCATTER})",
    ]
    failed = [cell for cell in cells if cell.record is None]
    if failed:
        lines = [f"- {_named(cell)}: {cell.status}, {_last_line(cell.error)}" for cell in failed]
        parts += ["## Cells without a result", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def write_page(cells: Sequence[CellRecord], out: Path, *, command: str = "") -> list[Path]:
    """Write the page, and its figures beside it.

    Returns:
        The files.

    Raises:
        ValueError: there is no record.
        ImportError: matplotlib is not installed.
    """
    page = survival_page(cells, command=command)
    done = [cell for cell in cells if cell.record is not None]
    figures = [out.with_name(CURVES), out.with_name(SCATTER)]
    survival_curves(_curves(done), figures[0])
    evidence_against_accuracy(_ends(done), figures[1])
    out.write_text(page, encoding="utf-8")
    return [out, *figures]


def grouped(cells: Iterable[CellRecord], by: Sequence[str]) -> dict[tuple[str, ...], list[CellRecord]]:
    """Return the records by the names of their parts."""
    found: dict[tuple[str, ...], list[CellRecord]] = {}
    for cell in cells:
        found.setdefault(tuple(str(cell.names.get(name, "")) for name in by), []).append(cell)
    return found


def spread(values: Sequence[float], form: str) -> str:
    """Return mean and standard deviation; the mean alone of a single value, a dash where one is missing."""
    if any(math.isnan(value) for value in values):
        return "-"
    middle = form.format(mean(values))
    return middle if len(values) < 2 else f"{middle} ± {stdev(values):.1f}"


def _table(cells: Sequence[CellRecord]) -> str:
    schemes = sorted({str(cell.names["scheme"]) for cell in cells})
    n_seeds = max(len(group) for group in grouped(cells, ("scheme", "attack")).values())
    head = [
        f"| attack ({n_seeds} seed{'s' * (n_seeds > 1)}) | {' | '.join(schemes)} |",
        "|---" * (len(schemes) + 1) + "|",
    ]
    before = [_before(cells, scheme) for scheme in schemes]
    rows = [f"| before any attack | {' | '.join(before)} |"]
    for (attack,), of_attack in sorted(grouped(cells, ("attack",)).items()):
        groups = _groups(of_attack)
        entries = [groups[scheme].text if scheme in groups else "" for scheme in schemes]
        rows.append(f"| {attack} | {' | '.join(entries)} |")
    return "\n".join([*head, *rows])


def _groups(cells: Sequence[CellRecord]) -> Mapping[str, Group]:
    done = grouped((cell for cell in cells if cell.record is not None), ("scheme",))
    return {
        scheme: Group(tuple(cell.record for cell in group if cell.record))
        for (scheme,), group in done.items()
    }


def _before(cells: Sequence[CellRecord], scheme: str) -> str:
    """Return what the scheme's models show, each seed once; from their weights if any cell reads those."""
    of_scheme = [cell for cell in cells if cell.record is not None and cell.names["scheme"] == scheme]
    by_seed: dict[object, Point] = {}
    for cell in sorted(of_scheme, key=lambda cell: cell.record is not None and cell.record.kind == "model"):
        assert cell.record is not None
        by_seed[cell.names["seed"]] = cell.record.before
    if not by_seed:
        return ""
    points = list(by_seed.values())
    evidence = spread([point.reading.log10_p_value for point in points], "{:.1f}")
    return f"{evidence}; accuracy {spread([100 * point.accuracy for point in points], '{:.1f}')} %"


def _curves(cells: Sequence[CellRecord]) -> dict[str, dict[str, list[list[Point]]]]:
    """Return the points along the dose by attack and scheme, one list for each seed."""
    found: dict[str, dict[str, list[list[Point]]]] = {}
    for cell in cells:
        assert cell.record is not None
        if cell.record.curve:
            of_scheme = found.setdefault(str(cell.names["attack"]), {}).setdefault(
                str(cell.names["scheme"]), []
            )
            of_scheme.append([cell.record.before, *cell.record.curve])
    return dict(sorted(found.items()))


def _ends(cells: Sequence[CellRecord]) -> dict[str, list[AttackRecord]]:
    return {
        scheme: [cell.record for cell in group if cell.record and cell.record.before.reading.proven]
        for (scheme,), group in sorted(grouped(cells, ("scheme",)).items())
    }


def _named(cell: CellRecord) -> str:
    return ", ".join(f"{name} {value}" for name, value in cell.names.items())


def _last_line(error: str | None) -> str:
    return (error or "").strip().splitlines()[-1] if (error or "").strip() else "no reason given"
