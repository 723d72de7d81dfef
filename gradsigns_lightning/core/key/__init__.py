"""The owner's key: its parameters, their derivation from one secret, its file, and its payload.

Nothing here depends on networks or training. What readers need of any key is in :mod:`.signature_key`.
"""

from typing import TYPE_CHECKING

from gradsigns_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from gradsigns_lightning.core.key.key import WatermarkKey
    from gradsigns_lightning.core.key.opening import key_of

__all__ = ["WatermarkKey", "key_of"]

# Lazy, because the modules of this package import each other.
__getattr__, __dir__ = lazy_names(__name__, {"key": "WatermarkKey", "opening": "key_of"})
