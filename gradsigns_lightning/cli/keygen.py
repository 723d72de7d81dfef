"""``gradsigns keygen``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradsigns_lightning.cli.build import build
from gradsigns_lightning.cli.report import print_rows, write_json
from gradsigns_lightning.core.key import WatermarkKey


def run(config: Any) -> None:
    """Make a key, save it, and print its public side.

    Raises:
        ValueError: the file exists, or the key cannot be made as asked.
    """
    out = Path(config.out).expanduser()
    key: WatermarkKey = build(config.key)
    key.save(out)
    public = key.to_public_dict()
    rows = {
        "key file": str(out),
        "owner": key.owner,
        "bits": f"{key.n_bits} on {key.n_carriers} of the inputs, class {key.target_class}",
        "input shape": " x ".join(map(str, key.input_shape)),
        "commitment": key.commitment,
    }
    print_rows(rows, title="key", note="Keep the file secret; publish the commitment before the model.")
    if config.json:
        write_json(config.json, {"key": str(out), "commitment": key.commitment, **public})
