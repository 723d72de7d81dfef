"""Second-order engines with one interface.

| engine | needs | exact | sharded parameters |
|---|---|---|---|
| `double_backward` | second derivatives of all operations in reverse mode | yes | no |
| `forward_over_reverse` | forward-mode derivatives of all operations and their backward passes | yes | yes |
| `finite_difference` | first derivatives only, smooth activations | to about 1e-3 | yes |

`auto` takes the first engine, in this order, that works on a few images of the first batch.
"""

from __future__ import annotations

from gradsigns_lightning.core.engines.base import EmbeddingLoss, Engine, differentiated
from gradsigns_lightning.core.engines.checking import check_engine
from gradsigns_lightning.core.engines.double_backward import DoubleBackward
from gradsigns_lightning.core.engines.finite_difference import FiniteDifference
from gradsigns_lightning.core.engines.forward_over_reverse import ForwardOverReverse
from gradsigns_lightning.core.settings import AUTO
from gradsigns_lightning.core.utils.checks import check_choice

ENGINES: dict[str, type[DoubleBackward] | type[ForwardOverReverse] | type[FiniteDifference]] = {
    engine.name: engine for engine in (DoubleBackward, ForwardOverReverse, FiniteDifference)
}


def make_engines(engine: str | Engine) -> tuple[Engine, ...]:
    """Return the engines to try, in order: the named or given one, or all of them for ``"auto"``."""
    if not isinstance(engine, str):
        return (engine,)
    check_choice("engine", engine, [AUTO, *ENGINES])
    return tuple(make() for name, make in ENGINES.items() if engine in (AUTO, name))


__all__ = [
    "AUTO",
    "ENGINES",
    "DoubleBackward",
    "EmbeddingLoss",
    "Engine",
    "FiniteDifference",
    "ForwardOverReverse",
    "check_engine",
    "differentiated",
    "make_engines",
]
