"""One target for each kind of foreign file or reply."""

from collections.abc import Callable
from dataclasses import dataclass

from fuzz_answers import image, server
from fuzz_bad import BAD
from fuzz_base import Reader
from fuzz_data import dataset
from fuzz_evidence import bundle, commitment, journal, key_file, time_stamp
from fuzz_models import checkpoint, onnx_file, released


@dataclass
class Target:
    """How a reader is made, and which modules besides this package are instrumented."""

    make: Callable[[], Reader]
    instrument: tuple[str, ...] = ()


TARGETS = {
    "checkpoint": Target(checkpoint, ("torch._weights_only_unpickler",)),
    "key": Target(key_file),
    "bundle": Target(bundle),
    "commitment": Target(commitment),
    "journal": Target(journal),
    "timestamp": Target(time_stamp),
    "onnx": Target(onnx_file),
    "image": Target(image, ("PIL",)),
    "dataset": Target(dataset, ("pickletools",)),
    "server": Target(server),
    "released": Target(released, ("numpy.lib.format", "numpy.lib._format_impl")),
    **{name: Target(make) for name, make in BAD.items()},
}
