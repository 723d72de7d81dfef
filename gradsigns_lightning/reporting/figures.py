"""Figures of the benchmark's records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradsigns_lightning.benchmark.records import MOST_ACCURACY_LOST, AttackRecord, Point
from gradsigns_lightning.core.utils.optional import require

_COLUMNS = 4
_PROOF = 9  # -log10 of the usual significance level


def survival_curves(curves: Mapping[str, Mapping[str, Sequence[Sequence[Point]]]], file: Path) -> None:
    """Draw evidence along the dose, a panel for each attack, a line for each seed, a colour for each scheme.

    Args:
        curves: points by attack, scheme and seed.
        file: the image to write; its suffix says which format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", extra="report")
    from matplotlib.lines import Line2D

    schemes = sorted({scheme for of_attack in curves.values() for scheme in of_attack})
    n_rows = max(1, math.ceil(len(curves) / _COLUMNS))
    figure = _figure(3.2 * min(_COLUMNS, max(1, len(curves))), 2.6 * n_rows)
    for number, (attack, of_attack) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(n_rows, min(_COLUMNS, len(curves)), number)
        for scheme, seeds in of_attack.items():
            for points in seeds:
                axes.plot(
                    [point.dose for point in points],
                    [evidence(point) for point in points],
                    color=f"C{schemes.index(scheme)}",
                )
        axes.axhline(_PROOF, color="grey", linestyle=":")
        axes.set_title(attack, fontsize=9)
        axes.set_xlabel("dose", fontsize=8)
        axes.set_ylabel("-log10 p", fontsize=8)
    lines = [Line2D([], [], color=f"C{number}") for number in range(len(schemes))]
    figure.legend(lines, schemes, loc="outside lower center", ncols=max(1, len(schemes)), fontsize=8)
    figure.savefig(file)


def evidence_against_accuracy(ends: Mapping[str, Sequence[AttackRecord]], file: Path) -> None:
    """Draw what each attack left of the evidence against its cost; where the thief wins is shaded.

    Args:
        ends: records by scheme.
        file: the image to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(7, 4.5)
    axes = figure.add_subplot()
    for number, (scheme, records) in enumerate(ends.items()):
        lost = [100 * record.accuracy_lost for record in records]
        axes.scatter(
            lost, [evidence(record.after) for record in records], color=f"C{number}", s=14, label=scheme
        )
    low, high = axes.get_xlim()
    axes.fill_between(
        [low, 100 * MOST_ACCURACY_LOST], 0, _PROOF, color="red", alpha=0.08, label="the thief wins"
    )
    axes.set_xlim(low, max(high, 100 * MOST_ACCURACY_LOST + 1))
    axes.set_xlabel("accuracy lost, points")
    axes.set_ylabel("-log10 p")
    axes.legend(fontsize=8)
    figure.savefig(file)


def evidence(point: Point) -> float:
    """Return -log10 of the p-value, 0 where no bit was decided."""
    value = point.reading.log10_p_value
    return 0.0 if math.isnan(value) else -value


def _figure(width: float, height: float) -> Any:
    """Return a figure that needs no display and leaves pyplot's state alone."""
    require("matplotlib", extra="report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
