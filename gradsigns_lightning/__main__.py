"""``python -m gradsigns_lightning`` is the ``gradsigns`` command."""

from __future__ import annotations

import sys
from pathlib import Path

# Python looks for modules in the current folder first, which may be a received one: Hydra, for one, runs every `hydra_plugins`.
_OWN = Path(__file__).resolve().parents[1]
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path.cwd() or Path.cwd() == _OWN]

from gradsigns_lightning.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
