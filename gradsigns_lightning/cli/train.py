"""``gradsigns train``."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import seed_everything
from rich.console import Console

from gradsigns_lightning.cli.callbacks import QuietWorkers, progress_callbacks
from gradsigns_lightning.cli.runner import Outcome
from gradsigns_lightning.cli.tables import (
    check_json_path,
    format_p_value,
    in_sweep,
    print_rows,
    say,
    short_path,
    verification_rows,
    write_json,
)
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.key.payload import out_of_reach
from gradsigns_lightning.core.utils.text import printable
from gradsigns_lightning.runs import fit
from gradsigns_lightning.runs.build import build
from gradsigns_lightning.runs.callbacks import KeyKeeper
from gradsigns_lightning.runs.key import check_key_fits
from gradsigns_lightning.runs.options import options, train_names
from gradsigns_lightning.runs.own import build_data, is_described, modules_of, settings_of
from gradsigns_lightning.runs.train import Arm, train


def run(config: Any) -> Outcome:
    """Train and sign a model, read the signature back, and report.

    Returns:
        The bit error rate, for sweeps; NaN if no bit could be read.

    Raises:
        ValueError: the configuration does not fit together.
    """
    with modules_of(config.code):
        return _run(settings_of(config, HydraConfig.get().runtime.choices))


def _run(settings: dict[str, Any]) -> Outcome:
    folder = Path(settings["paths"]["output_dir"])
    check_json_path(settings["json"])
    _tell_place(folder)
    seed_everything(settings["seed"], verbose=False)
    data = build_data(settings["data"]["module"])
    _check_described(settings["data"], data)
    key = _key(settings)
    key_file = _key_file(settings, folder)
    logger = fit.build_logger(settings)
    name = "signed" if settings["watermark"] else "unmarked"
    keeper = KeyKeeper(key, key_file)
    with options(train_names(settings)):
        main = _train(settings, name, folder, data, key, logger=logger, keeper=keeper)
    twin = None
    if settings["twin"]:
        twin = _train(settings, "twin", folder, data, key, logger=fit.build_twin_logger(settings))
    summary = _summary(settings, main, twin, key_file)
    offline = fit.log_summary(logger, summary)
    if offline:
        say(printable(f"W&B run, offline: wandb sync {short_path(offline)}"))
    notes = [
        out_of_reach(key) if settings["key"].get("path") is None else "",
        _own_network(settings, summary["checkpoint"]),
    ]
    print_rows(_rows(summary, main, twin), title="gradsigns train", note="\n".join(filter(None, notes)))
    if settings["json"]:
        write_json(settings["json"], {**summary, "config": settings})
    return Outcome(bit_error_rate=main.result.bit_error_rate, cell=_cell(main, twin))


def _check_described(described: dict[str, Any], data: Any) -> None:
    """Refuse a description of the data, from which key and network are made, that the data contradict.

    A data module of the user's own may state neither shape nor number of classes.
    """
    shape, n_classes = tuple(described["input_shape"]), described["n_classes"]
    found, least = getattr(data, "input_shape", shape), getattr(data, "n_classes", n_classes)
    if shape != tuple(found):
        raise ValueError(f"`data.input_shape` must be {list(found)}, as the images are, got {list(shape)}.")
    if n_classes < least:
        raise ValueError(f"`data.n_classes` must be at least {least}, as the labels are, got {n_classes}.")


def _own_network(settings: dict[str, Any], checkpoint: str) -> str:
    """Return how to verify a network of the user's own; empty for one that `gradsigns verify` can build."""
    if is_described(settings["model"]):
        return ""
    arguments = f"{short_path(checkpoint)!r}, net=..., n_classes={settings['data']['n_classes']}"
    return (
        f"{settings['model']['_target_']} is not a network of this package or torchvision, so `gradsigns "
        "verify checkpoint=` cannot build it. In Python: model = "
        f"gradsigns_lightning.models.Classifier.load_from_checkpoint({arguments}); "
        "gradsigns_lightning.verify(model, key, images)."
    )


def _tell_place(folder: Path) -> None:
    """Warn where a link leads: in a received folder, `outputs` could link into a folder that others read."""
    place = folder.resolve()
    if folder.absolute().is_relative_to(Path.cwd()) and not place.is_relative_to(Path.cwd().resolve()):
        link = short_path(folder.parent)
        message = f"{link} is a link out of the current folder: checkpoint and key are written to {place}."
        warnings.warn(message, UserWarning, stacklevel=2)


def _cell(main: Arm, twin: Arm | None) -> dict[str, str]:
    rows = verification_rows(main.result)
    cell = {name: rows[name] for name in ("verdict", "matching bits")} | {
        "p-value": format_p_value(main.result)
    }
    cell["accuracy"] = f"{main.accuracy:.2%}"
    return cell | ({"twin's accuracy": f"{twin.accuracy:.2%}"} if twin else {})


def _key(settings: dict[str, Any]) -> WatermarkKey:
    key: WatermarkKey = build(settings["key"], option="key")
    shown = settings["data"]
    check_key_fits(key, input_shape=shown["input_shape"], input_mean=shown["mean"], input_std=shown["std"])
    return key


def _key_file(settings: dict[str, Any], folder: Path) -> Path:
    if settings["key"].get("path") is not None:
        return Path(settings["key"]["path"]).expanduser()
    file = folder / "key.gskey"
    if file.exists():
        raise ValueError(
            f"`hydra.run.dir` must name a folder without a key of its own, got one with {str(file)!r}."
        )
    return file


def _train(settings: dict[str, Any], name: str, *arguments: Any, **further: Any) -> Arm:
    console = Console(highlight=False)
    told = settings["progress"] and not in_sweep()
    return train(
        settings,
        *arguments,
        name=name,
        callbacks=[QuietWorkers(), *progress_callbacks(name, progress=settings["progress"])],
        tell=console.print if told else lambda text: None,
        **further,
    )


def _summary(settings: dict[str, Any], main: Arm, twin: Arm | None, key_file: Path) -> dict[str, Any]:
    return {
        **main.result.to_dict(),
        "end_of_fit": main.standing.to_dict() if main.standing else None,
        "accuracy": main.accuracy,
        "twin_accuracy": twin.accuracy if twin else None,
        "twin_n_matches": twin.result.n_matches if twin else None,
        "twin_bit_error_rate": twin.result.bit_error_rate if twin else None,
        "twin_p_value": twin.result.p_value if twin else None,
        "twin_verdict": twin.result.verdict if twin else None,
        "seconds_per_epoch": main.seconds_per_epoch,
        "twin_seconds_per_epoch": twin.seconds_per_epoch if twin else None,
        "checkpoint": str(main.checkpoint),
        "twin_checkpoint": str(twin.checkpoint) if twin else None,
        "key": str(key_file),
        "data": settings["data"]["name"],
        "epochs": settings["trainer"].get("max_epochs"),
        "seed": settings["seed"],
        "watermark": bool(settings["watermark"]),
    }


def _rows(summary: dict[str, Any], main: Arm, twin: Arm | None) -> dict[str, str]:
    ended = {"at the end of the fit": str(main.standing)} if main.standing else {}
    rows = {**verification_rows(main.result), **ended, "accuracy": f"{main.accuracy:.2%}"}
    seconds = f"{main.seconds_per_epoch:.2f}"
    if twin:
        points = 100 * (main.accuracy - twin.accuracy)
        rows["accuracy"] += f" ({points:+.2f} points against the unmarked twin's {twin.accuracy:.2%})"
        rows["twin's bits"] = (
            f"{twin.result.n_matches} of {twin.result.n_bits} (p = {twin.result.p_value:.2g})"
        )
        ratio = main.seconds_per_epoch / twin.seconds_per_epoch if twin.seconds_per_epoch else math.nan
        seconds += f" ({ratio:.2f} times the twin's {twin.seconds_per_epoch:.2f})"
    return {
        **rows,
        "seconds per epoch": seconds,
        "key file": short_path(summary["key"]),
        "checkpoint": short_path(summary["checkpoint"]),
        "key's commitment": main.result.commitment,
    }
