"""What any careful program needs: argument checks, files, text and data of strangers, optional imports.

Nothing here knows of networks, gradients, keys or marks, and nothing here imports torch or another room of
the package.
"""
