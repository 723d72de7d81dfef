"""General helpers: argument checks, files, untrusted text and data, optional imports.

Nothing here depends on networks, gradients, keys or marks, and nothing imports torch or another subpackage.
"""
