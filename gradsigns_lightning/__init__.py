"""Sign a classifier's input gradients while it trains, and prove later that the model is yours."""

import os
import sys

# `python -m gradsigns_lightning`, `-mgradsigns_lightning`, `-m gradsigns_lightning.__main__` and so on look
# for modules in the current folder first, which may be a received one. So above this point nothing is
# imported but what Python has imported itself.
if (
    sys.argv[:1] == ["-m"]
    and any(
        name and (not flag or (flag[0] == "-" and flag[-1] == "m")) and (not rest or rest[0] == ".")
        for flag, name, rest in (word.partition(__name__) for word in sys.orig_argv)
    )
    and not getattr(sys.flags, "safe_path", False)
):
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != os.path.realpath("")]

from typing import TYPE_CHECKING

from gradsigns_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from gradsigns_lightning.core import (
        Cadence,
        MarginObjective,
        PaperObjective,
        StrengthSchedule,
        WatermarkKey,
    )
    from gradsigns_lightning.core.key.payload import customer_key, message_key
    from gradsigns_lightning.core.result import VerificationResult
    from gradsigns_lightning.integration import FabricGradSigns, GradSigns, GradSignsMixin, strip
    from gradsigns_lightning.verification import (
        ApiVerificationResult,
        Message,
        TraceResult,
        read_message,
        trace,
        verify,
        verify_api,
        verify_many,
    )

__version__ = "0.1.0"

__all__ = [
    "ApiVerificationResult",
    "Cadence",
    "FabricGradSigns",
    "GradSigns",
    "GradSignsMixin",
    "MarginObjective",
    "Message",
    "PaperObjective",
    "StrengthSchedule",
    "TraceResult",
    "VerificationResult",
    "WatermarkKey",
    "customer_key",
    "message_key",
    "read_message",
    "strip",
    "trace",
    "verify",
    "verify_api",
    "verify_many",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "core": "Cadence MarginObjective PaperObjective StrengthSchedule WatermarkKey",
        "core.key.payload": "customer_key message_key",
        "core.result": "VerificationResult",
        "integration": "FabricGradSigns GradSigns GradSignsMixin strip",
        "verification": "ApiVerificationResult Message TraceResult read_message trace verify verify_api "
        "verify_many",
    },
    modules=("core", "evidence", "integration", "legacy", "oracles", "verification"),
)
