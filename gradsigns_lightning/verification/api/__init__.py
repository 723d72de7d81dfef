"""Reading through responses alone: which images are queried, what responses say, and when they suffice.

The reader is :func:`.verify.verify_api`. Nothing here looks into a model, and nothing depends on how a
response travels: oracles behind HTTP and in ONNX files are in :mod:`gradsigns_lightning.oracles`.
"""
