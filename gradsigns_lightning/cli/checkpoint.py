"""What ``gradsigns train`` writes into a checkpoint so that ``gradsigns verify`` can rebuild the model, and run nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from gradsigns_lightning import models
from gradsigns_lightning.cli.build import build, iterate_targets
from gradsigns_lightning.models import Classifier

ENTRY = "gradsigns"
FORMAT = 1


def describe(model: dict[str, Any], data: dict[str, Any], commitment: str) -> dict[str, Any]:
    """Return the checkpoint's description of the model, as plain types.

    Args:
        model: resolved configuration of the network.
        data: resolved configuration of the data; its name and shapes are kept.
        commitment: the key's public commitment.
    """
    kept = {name: data[name] for name in ("name", "n_classes", "input_shape", "mean", "std")}
    return {ENTRY: {"format": FORMAT, "model": model, "data": kept, "commitment": commitment}}


def read_checkpoint(path: str, *, argument: str = "checkpoint") -> dict[str, Any]:
    """Read a checkpoint as plain data; nothing in it is run.

    Raises:
        ValueError: the file is missing or no checkpoint with weights.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"`{argument}` must name a checkpoint file, got '{path}', which is not there.")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"`{argument}`: '{path}' is damaged, or no checkpoint of weights and plain types.") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError(f"`{argument}`: '{path}' has no `state_dict`; it is not a Lightning checkpoint.")
    return content


def description_of(checkpoint: dict[str, Any], path: str) -> dict[str, Any]:
    """Return what :func:`describe` put into a checkpoint.

    Raises:
        ValueError: it was not written by ``gradsigns train``, or by a later release.
    """
    description = (checkpoint.get("hyper_parameters") or {}).get(ENTRY)
    if not isinstance(description, dict):
        raise ValueError(
            f"`checkpoint`: '{path}' was not written by `gradsigns train`, so how to build its model is not known. "
            "Load it in Python and call gradsigns_lightning.verify(model, key, images)."
        )
    if description.get("format") != FORMAT:
        raise ValueError(f"`checkpoint`: '{path}' has format {description.get('format')!r}, this release reads {FORMAT}.")
    return description


def load_classifier(checkpoint: dict[str, Any], description: dict[str, Any]) -> Classifier:
    """Return the classifier that a checkpoint describes, with its weights.

    Raises:
        ValueError: the description names something other than a network, or the weights do not fit it.
    """
    model = description["model"]
    for target in iterate_targets(model):
        if not _is_network(target):
            raise ValueError(f"`checkpoint` describes a model {target!r}, none of this package's or torchvision's networks.")
    classifier = Classifier(build(model), description["data"]["n_classes"])
    load_weights(classifier, checkpoint, argument="checkpoint")
    return classifier.eval()


def load_weights(classifier: Classifier, checkpoint: dict[str, Any], *, argument: str) -> None:
    """Copy a checkpoint's weights into ``classifier``.

    Raises:
        ValueError: they do not fit.
    """
    try:
        classifier.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"`{argument}`: the weights do not fit the model: {reason}") from error


def _is_network(target: Any) -> bool:
    """Tell whether a checkpoint, which may come from anyone, may have this target called: exact names only."""
    if not isinstance(target, str):
        return False
    package, _, name = target.rpartition(".")
    if package == models.__name__:
        return name in models.__all__
    if package == "torchvision.models":
        from gradsigns_lightning.data.optional import import_torchvision

        torchvision_models = import_torchvision("models")
        return name in torchvision_models.list_models(module=torchvision_models)
    return False
