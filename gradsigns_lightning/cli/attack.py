"""``gradsigns attack``."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradsigns_lightning.attacks.base import Attack
from gradsigns_lightning.benchmark import AttackRecord, Judge, KeyReader, Point, attacked
from gradsigns_lightning.benchmark.measuring import best_device
from gradsigns_lightning.benchmark.thieves import thief_of
from gradsigns_lightning.cli.runner import Outcome
from gradsigns_lightning.cli.tables import as_sentence, check_json_path, print_rows, write_json
from gradsigns_lightning.core.result import bits_in_words
from gradsigns_lightning.core.utils.checks import check_instance
from gradsigns_lightning.runs.build import build, to_plain
from gradsigns_lightning.runs.options import load_key, options
from gradsigns_lightning.runs.suspect import check_normalization, open_checkpoint, suspect_data


def run(config: Any) -> Outcome:
    """Attack a signed model, and report what is left of the mark and at what price.

    Returns:
        What a sweep shows of it.

    Raises:
        ValueError: model, key, data and attack do not fit together.
    """
    settings = to_plain(config)
    check_json_path(settings["json"])
    key = load_key(settings["key"]["path"])
    attack = build(settings["attack"], option="attack")
    check_instance("attack", attack, Attack)
    stolen = open_checkpoint(settings["checkpoint"], key)
    check_normalization(stolen, key)
    assert isinstance(stolen.model, nn.Module)
    data = suspect_data(settings, stolen.data_name)
    data.setup()
    with options({name: f"recipe.{name}" for name in settings["recipe"]} | {"share": "share"}):
        recipe = build(settings["recipe"], option="recipe")
        thief = thief_of(data, recipe, share=settings["share"], n_bits=key.n_bits)
    images = data.raw_images("test", key.target_class)
    reader = KeyReader(key, images, alpha=settings["alpha"], max_queries=settings["max_queries"])
    judge = Judge(reader, data.test_dataloader())
    with options({name: f"attack.{name}" for name in settings["attack"]}):
        _, record = attacked(stolen.model.to(best_device()), attack, thief, judge)
    rows = _rows(record, settings)
    print_rows(rows, title="gradsigns attack", note=as_sentence(_verdict(record)))
    if settings["json"]:
        sources = {"checkpoint": settings["checkpoint"], "key": settings["key"]["path"]}
        write_json(settings["json"], {**record.to_dict(), **sources})
    return Outcome(
        cell={"accuracy": accuracy_of(record.after), "mark": mark_of(record.after), "thief": who_wins(record)}
    )


def _rows(record: AttackRecord, settings: dict[str, Any]) -> dict[str, str]:
    told = ", ".join(f"{name} {value}" for name, value in record.settings.items())
    return {
        "attack": f"{record.attack}: {told}",
        "thief's images": str(record.n_images),
        "thief trains": ", ".join(f"{name} {value}" for name, value in record.recipe.items()),
        "seconds": f"{record.seconds:.1f}",
        "before": point_row(record.before),
        **curve_rows(record),
        "after": point_row(record.after),
        "checkpoint": settings["checkpoint"],
        "key file": settings["key"]["path"],
    }


def curve_rows(record: AttackRecord) -> dict[str, str]:
    """Return what models on the way show; not the last of them again where it is what the attack returns."""
    last = record.curve[-1] if record.curve else None
    points = record.curve[:-1] if last == record.after else record.curve
    return {f"at dose {point.dose:g}": point_row(point) for point in points}


def point_row(point: Point) -> str:
    """Return what a model shows, in words."""
    return f"accuracy {accuracy_of(point)}; {mark_of(point)}; {point.reading.verdict.replace('_', ' ')}"


def accuracy_of(point: Point) -> str:
    """Return a model's accuracy as text."""
    return f"{point.accuracy:.4f}"


def mark_of(point: Point) -> str:
    """Return what was read of the mark, in words."""
    reading = point.reading
    weighted = "" if reading.w != reading.w else f", w = {reading.w:.1f}"
    words = bits_in_words(reading.n_matches, reading.n_bits, reading.n_erasures, reading.log10_p_value)
    return words + weighted


def who_wins(record: AttackRecord) -> str:
    """Return whether the thief wins, in words."""
    return "wins" if record.wins else "does not win"


def _verdict(record: AttackRecord) -> str:
    lost = f"{100 * record.accuracy_lost:.1f} points of accuracy"
    if not record.before.reading.proven:
        return "the mark was not proven before the attack, so it tells nothing about the mark"
    if record.wins:
        return f"the thief wins: the mark is no longer proven, for {lost}"
    if record.after.reading.proven:
        return f"the mark is proven still; the attack cost {lost}"
    return f"the mark is no longer proven, but the attack cost {lost}: the thief does not win"
