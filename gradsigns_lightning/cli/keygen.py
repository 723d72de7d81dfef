"""``gradsigns keygen``."""

from __future__ import annotations

import shlex
from typing import Any

from omegaconf import OmegaConf

from gradsigns_lightning.cli.runner import Outcome
from gradsigns_lightning.cli.tables import check_json_path, print_rows, write_json
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.key.payload import customer_key, message_key, out_of_reach
from gradsigns_lightning.core.utils.files import check_target
from gradsigns_lightning.runs.build import build
from gradsigns_lightning.runs.options import options


def run(config: Any) -> Outcome:
    """Make a key, save it, and print its public side.

    Returns:
        The outcome for a sweep's table.

    Raises:
        ValueError: the file exists, or the key cannot be made as requested.
    """
    out = check_target(config.out, argument="out", overwrite=False)
    check_json_path(config.json)
    key = _derived(config) if config.master is not None else _new(config)
    _check_class(config, key)
    key.save(out)
    public = key.to_public_dict()
    rows = {
        "key file": str(out),
        "owner": key.owner,
        "bits": f"{key.n_bits} on {key.n_carriers} of the inputs, class {key.target_class}",
        "input shape": " x ".join(map(str, key.input_shape)),
        "key's commitment": key.commitment,
    }
    commit = f"gradsigns commit key={shlex.quote(str(out))}"
    note = f"Keep the file secret. Before you release the model: {commit}, and publish what it writes."
    note = f"{note}\n{out_of_reach(key)}".rstrip()
    print_rows(rows, title="key", note=note)
    if config.json:
        write_json(config.json, {"key": str(out), "commitment": key.commitment, **public})
    return Outcome(cell={name: rows[name] for name in ("key file", "key's commitment")})


def _check_class(config: Any, key: WatermarkKey) -> None:
    n_classes = OmegaConf.select(config, "data.n_classes", throw_on_missing=False)
    if config.master is None and n_classes is not None and key.target_class >= n_classes:
        raise ValueError(
            f"`target_class` must be below the data set's number of classes {n_classes}, got "
            f"{key.target_class}."
        )


def _new(config: Any) -> WatermarkKey:
    if config.customer is not None:
        raise ValueError("`customer` needs `master=FILE`, the key from which all customers' keys are made.")
    if "path" in config.key:
        raise ValueError(
            f"`key` must be the size of a new key, such as b128, got an existing key, {config.key.path!r}."
        )
    names = {name: name for name in ("owner", "scope", "target_class", "payload")}
    key: WatermarkKey = build(config.key, option="key", names=names)
    return key if config.message is None else message_key(key, config.message)


def _derived(config: Any) -> WatermarkKey:
    """Return the key of a customer's copy, or of a copy with a message."""
    with options({"path": "master"}):
        master = WatermarkKey.load(config.master)
    if (config.customer is None) == (config.message is None):
        raise ValueError("`customer` or `message` must be given with `master`, and not both.")
    return (
        customer_key(master, config.customer)
        if config.message is None
        else message_key(master, config.message)
    )
