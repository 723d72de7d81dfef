"""What commands and benchmarks share: typed configuration, and the objects built from it or a received file.

Nothing here prints or parses a command line (:mod:`gradsigns_lightning.cli` does). Only these two packages
import Hydra.
"""
