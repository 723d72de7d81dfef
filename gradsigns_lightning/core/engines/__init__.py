"""Second-order engines behind one seam.

| engine | needs | exact | state |
|---|---|---|---|
| `double_backward` | twice differentiable operations, no `torch.compile`, no sharding | yes | default |
"""

from __future__ import annotations

from gradsigns_lightning.core.checks import check_choice
from gradsigns_lightning.core.engines.base import EmbeddingLoss, Engine
from gradsigns_lightning.core.engines.double_backward import DoubleBackward

ENGINES: dict[str, type[DoubleBackward]] = {DoubleBackward.name: DoubleBackward}


def make_engine(engine: str | Engine) -> Engine:
    """Return the engine of that name, or the object itself."""
    if not isinstance(engine, str):
        return engine
    check_choice("engine", engine, ENGINES)
    return ENGINES[engine]()


__all__ = ["ENGINES", "DoubleBackward", "EmbeddingLoss", "Engine", "make_engine"]
