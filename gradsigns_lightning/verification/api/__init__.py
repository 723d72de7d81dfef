"""Reading through answers alone: which images are asked about, what an answer says, and when the answers suffice.

The reader is :func:`.verify.verify_api`. Nothing here looks into a model, and nothing knows how an answer
travels: what can be asked over a network or a file is in :mod:`gradsigns_lightning.oracles`.
"""
