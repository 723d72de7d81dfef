"""The command line: one module for each command, and what they print.

Hydra's decorator, its errors and its help are handled here; configurations and the objects built from them
are in :mod:`gradsigns_lightning.runs`.
"""

from gradsigns_lightning.cli.dispatch import main

__all__ = ["main"]
