"""What an attack did to a model, measured and judged by the rule of the field's benchmark.

Records are plain. Nothing here prints, plots or logs.
"""

from typing import TYPE_CHECKING

from gradsigns_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from gradsigns_lightning.benchmark.measuring import Judge, KeyReader, attacked
    from gradsigns_lightning.benchmark.records import AttackRecord, Point, Reading

__all__ = ["AttackRecord", "Judge", "KeyReader", "Point", "Reading", "attacked"]

__getattr__, __dir__ = lazy_names(
    __name__, {"measuring": "Judge KeyReader attacked", "records": "AttackRecord Point Reading"}
)
