"""``python -m gradsigns_lightning`` is the ``gradsigns`` command."""

from __future__ import annotations

import sys

from gradsigns_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
