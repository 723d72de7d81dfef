"""What commands and benchmarks share: typed configuration, and the objects that are built from it or from a received file.

Nothing here prints or parses a command line (:mod:`gradsigns_lightning.cli` does). Hydra is imported here and
there only.
"""
