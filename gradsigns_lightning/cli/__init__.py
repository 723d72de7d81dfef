"""The command line: ``gradsigns keygen``, ``gradsigns train`` and ``gradsigns verify``; the only room that knows Hydra."""

from gradsigns_lightning.cli.dispatch import main

__all__ = ["main"]
