"""The command line: one file for each command, and what they print; the work is done in the rooms below.

Hydra's decorator, its errors and its help are dealt with here; configurations and what is built from them are
in :mod:`gradsigns_lightning.runs`.
"""

from gradsigns_lightning.cli.dispatch import main

__all__ = ["main"]
