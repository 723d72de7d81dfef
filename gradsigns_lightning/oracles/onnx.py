"""An oracle in an ONNX file.

The file may come from the accused, so the runtime gets only its checked content, never a path: an ONNX file
can refer to other files, and other formats, which the runtime recognises by the file's extension, are not
checked here.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as NotInTimeError
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gradsigns_lightning.core.utils.checks import check_number
from gradsigns_lightning.core.utils.optional import require
from gradsigns_lightning.lazy import in_pythons_folder, is_command
from gradsigns_lightning.oracles.onnx_content import checked_content
from gradsigns_lightning.verification.images import pixels_of

_MOST_MEMORY = 6 << 30  # bytes for all models: the largest file's weights, and 4 GiB to compute in
_MOST_IN_ALL = 8 << 30  # bytes by which a command's process may grow while it loads or runs a model
_MOST_SCORES = 1 << 25  # of one call; they are converted to float64, more than once
_TIME_LIMIT = 600.0  # seconds for loading, and for each call
_POLL = 0.2  # seconds
_PATIENCE = 2.0  # seconds in which a step of a usual graph is done
T = TypeVar("T")


class OnnxOracle:
    """Runs an ONNX file on the CPU and returns its first output.

    The file must take one input ``(n, C, H, W)`` of float32, or of uint8 values 0 to 255. If it expects
    normalized images, wrap the oracle in :func:`normalized`.

    The graph's tensors may take 6 GiB; a larger allocation is refused in advance, whatever its shape (unless
    the process has registered an allocator of its own with onnxruntime). What operators such as ``NonZero``,
    ``Unique`` or those of sequences store besides their tensors, which may be hundreds of times as much, is
    bounded only in a command on Linux: a library call runs in the caller's process, so read a file from an
    opponent in a process with a limit (``resource.setrlimit``, a container).

    Args:
        path: the ONNX file.
        time_limit: seconds that loading and each call may take, above 0. A call that takes longer is aborted
            after the current step of the graph; a step that does not end continues in a thread of its own
            until the process ends.

    Raises:
        ValueError: the file is missing, not an ONNX model, refers to other files, has sparse tensors,
            strings, `RoiAlign`, too many parts, or functions that grow beyond bounds, takes something other
            than one image tensor, or is not loaded in time.
        TypeError: ``time_limit`` is not a number.
        ImportError: onnx or onnxruntime is not installed.
    """

    def __init__(self, path: str | PathLike[str], *, time_limit: float = _TIME_LIMIT) -> None:
        self._time_limit = check_number(
            "time_limit", time_limit, minimum=sys.float_info.min, maximum=threading.TIMEOUT_MAX
        )
        with in_pythons_folder():
            require("onnxruntime", extra="onnx")
        content = checked_content(Path(path).expanduser())
        try:
            _bound_memory()
            self._session = _in_time(lambda: _session(content), self._time_limit)
        except NotInTimeError:
            raise ValueError(
                f"`path`: the model in {str(path)!r} is not loaded in {self._time_limit:g} seconds."
            ) from None
        except Exception as error:  # onnxruntime's errors share no other base class
            raise ValueError(
                f"`path`: {str(path)!r} is damaged or not an ONNX model that can be run."
            ) from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if (
            len(inputs) != 1
            or inputs[0].type not in ("tensor(float)", "tensor(uint8)")
            or len(inputs[0].shape) != 4
        ):
            found = ", ".join(f"{i.name!r} {i.type} {i.shape}" for i in inputs)
            raise ValueError(
                f"`path`: the model in {str(path)!r} must take one float32 or uint8 tensor (n, C, H, W), "
                f"got {found}."
            )
        if not outputs or not outputs[0].type.startswith("tensor("):
            raise ValueError(f"`path`: the model in {str(path)!r} must return a tensor of scores first.")
        self._input, self._output = inputs[0], outputs[0]

    def __call__(self, images: Tensor) -> npt.NDArray[Any]:
        """Return the first output for raw images ``(n, C, H, W)``, float32.

        Raises:
            ValueError: the model cannot be run on the images, takes too long, or returns a single number or
                too many.
        """
        import onnxruntime

        takes_bytes = self._input.type == "tensor(uint8)"
        array = (pixels_of(images) if takes_bytes else images).detach().cpu().numpy()
        one_by_one = isinstance(self._input.shape[0], int)
        batches = np.split(array, len(array)) if one_by_one and self._input.shape[0] == 1 else [array]
        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
        try:
            give_up = partial(setattr, options, "terminate", True)
            outputs = _in_time(lambda: self._outputs(batches, options), self._time_limit, give_up)
        except NotInTimeError:
            raise ValueError(
                f"the ONNX model takes more than {self._time_limit:g} seconds for {len(images)} images; "
                "query fewer at once (`batch_size`), or give `OnnxOracle` a longer `time_limit`."
            ) from None
        except Exception as error:  # onnxruntime's errors share no other base class
            raise ValueError(
                f"the ONNX model cannot be run on images {tuple(images.shape)}: {str(error)[:200]!r}."
            ) from error
        if any(np.ndim(output) == 0 for output in outputs):
            raise ValueError(
                "the ONNX model must return a row of scores for each image, got a single number."
            )
        return np.concatenate(outputs)

    def _outputs(self, batches: list[npt.NDArray[Any]], options: Any) -> list[npt.NDArray[Any]]:
        outputs: list[npt.NDArray[Any]] = []
        for batch in batches:
            outputs += self._session.run([self._output.name], {self._input.name: batch}, options)
            if sum(map(np.size, outputs)) > _MOST_SCORES:
                raise ValueError(f"it returns more than {_MOST_SCORES} scores")
        return outputs


def _in_time(work: Callable[[], T], seconds: float, give_up: Callable[[], Any] = lambda: None) -> T:
    """Return what ``work`` returns, if it is done in time.

    Raises:
        NotInTimeError: the time is over; ``give_up`` was called to stop the work. If that has no effect, the
            work continues in a thread that nobody waits for.
    """
    done: Future[T] = Future()

    def do() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # whatever it is, the caller gets it
            done.set_exception(error)

    end = time.monotonic() + seconds
    with _bounded_process():
        try:
            threading.Thread(target=do, daemon=True).start()
            # Polled, because a KeyboardInterrupt that comes right before a wait is raised only after it.
            while not done.done() and (left := end - time.monotonic()) > 0:
                wait([done], timeout=min(left, _POLL))
            return done.result(timeout=0)
        finally:
            if not done.done():  # out of time, or interrupted
                give_up()
                # a thread that returns while Python shuts down would abort the process
                wait([done], timeout=_PATIENCE)


@contextmanager
def _bounded_process() -> Iterator[None]:
    """In a command on Linux, limit the growth of the process to ``_MOST_IN_ALL``.

    What an operator such as `Unique` stores besides its tensors does not come from an allocator that could be
    bounded. In a library call this does nothing, because the process is the caller's.
    """
    taken = Path("/proc/self/statm")
    if not is_command() or not taken.exists():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    most = int(taken.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + _MOST_IN_ALL
    bounds = [bound for bound in (most, *before) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _session(content: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    # the log would write names from the foreign model to the terminal, as would the fallback
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        content,
        sess_options=options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["ConstantFolding"],  # it computes while loading, in memory that is not bounded
        enable_fallback=0,
    )


@lru_cache(maxsize=1)
def _bound_memory() -> None:
    """Register an allocator of at most ``_MOST_MEMORY`` for sessions that ask for it, which only ours do."""
    import onnxruntime

    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    # Extended as needed, not in powers of two, which would take up to twice as much.
    bounds = onnxruntime.OrtArenaCfg({"max_mem": _MOST_MEMORY, "arena_extend_strategy": 1})
    # the process may have registered one already; onnxruntime's errors share no other base class
    with suppress(Exception):
        onnxruntime.create_and_register_allocator(memory, bounds)
