"""Fuzzes readers of foreign files: `python fuzz_readers.py TARGET [TARGET ...] [libFuzzer options]`.

The targets are listed in fuzz_targets.py. Every input must lead to a result or a ValueError (OracleError for
a server) of reasonable length. Anything else ends the program with a non-zero exit code and leaves the input
as `crash-...`, `timeout-...` or `oom-...` in the current folder: another exception, 20 s without an end, too
much memory, a file opened outside the fuzzer's folder or for writing, a process, a socket, a module imported,
code run, a global looked up by a pickle. What libraries in C, C++ and Rust open by themselves is not seen.

A long run of one target, an hour, which keeps the inputs that it found in the folder `found`:

    mkdir -p found
    OMP_NUM_THREADS=1 python tests/fuzz/fuzz_readers.py checkpoint -max_total_time=3600 found

`python tests/fuzz/fuzz_readers.py checkpoint crash-...` reads an input again and prints its traceback.
test_fuzz_readers.py gives each target 15 seconds, or as many as the environment variable
GRADSIGNS_FUZZ_SECONDS says.
"""

import codecs
import os
import random
import resource
import shutil
import sys
import warnings
from pathlib import Path

import atheris
from fuzz_base import FOLDER
from fuzz_mutation import changed
from fuzz_targets import BAD, TARGETS

LONGEST = 20000  # bytes of an input
GROWTH = 1 << 30  # bytes of memory that an input may take beyond those of the seeds
LONGEST_MESSAGE = 5_000  # characters
FORBIDDEN = (
    *(
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.fork",
        "os.forkpty",
        "subprocess.",
        "socket.",
        "ctypes.",
    ),
    *(
        "import",
        "exec",
        "pickle.find_class",
        "marshal.",
        "code.__new__",
        "urllib.",
        "http.",
        "ftplib.",
        "smtplib.",
    ),
    *(
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.chmod",
        "shutil.",
    ),
    "tempfile.",
)
# Python's own modules that json, pickletools, zipfile (cp437) and the escaping of text import for some bytes.
CODECS = (
    *("cp437", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-16", "utf-32", "utf-8-sig"),
    *("raw-unicode-escape", "unicode-escape"),
)


class Guard:
    """Records a reader's side effects with an audit hook.

    Python cannot remove such a hook, so it is armed only while an input is read.
    """

    def __init__(self):
        self.armed, self.seen = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if self.armed and (event.startswith(FORBIDDEN) or (event == "open" and self._is_foreign(*arguments))):
            self.seen.append(f"{event} {arguments!r:.300}")
            raise PermissionError(self.seen[-1])

    @staticmethod
    def _is_foreign(path, mode, flags):
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        return bool(writes) or (
            not isinstance(path, int) and not Path(os.fsdecode(path)).resolve().is_relative_to(FOLDER)
        )


class Fuzzer:
    """Reads the inputs that libFuzzer makes, and makes half of them itself."""

    def __init__(self, name):
        with atheris.instrument_imports(include=["gradsigns_lightning", *TARGETS[name].instrument]):
            self.reader = TARGETS[name].make()
        self.seeds = FOLDER / f"seeds-{name}"
        self.seeds.mkdir()
        for number, seed in enumerate(self.reader.seeds):
            (self.seeds / str(number)).write_bytes(seed)
        warnings.showwarning = lambda *_, **__: None  # it would open a source file
        for codec in CODECS:
            codecs.lookup(codec)
        for seed in (*self.reader.seeds, *self.reader.warm_up):  # imports everything that reading needs
            self.reader.write(seed)
            self.read(seed)
        self.guard, self.limit = Guard(), peak() + GROWTH

    def read(self, data):
        try:
            self.reader.read(data)
        except self.reader.errors as error:
            if not 0 < len(str(error)) < LONGEST_MESSAGE:
                raise RuntimeError(
                    f"a message of {len(str(error))} characters: {str(error)[:200]!r}"
                ) from error

    def check(self, data):
        self.reader.write(data)
        self.guard.armed = True
        try:
            self.read(data)
        finally:
            self.guard.armed = False
        if self.guard.seen:
            raise RuntimeError(f"the input made the reader do: {self.guard.seen}")
        if peak() > self.limit:
            raise RuntimeError(
                f"the input made the reader take {peak() >> 20} MiB, {GROWTH >> 20} more than the seeds"
            )

    def mutate(self, data, size, seed):
        rng = random.Random(seed)
        if rng.random() < 0.6:
            try:
                made = self.reader.pack(changed(self.reader.unpack(data), rng))
            except Exception:  # bytes that are not such a file, or a change that cannot be written
                made = b""
            if 0 < len(made) <= size:
                return made
        return atheris.Mutate(data, size)

    def run(self, options):
        limits = ["-timeout=20", f"-max_len={LONGEST}", f"-rss_limit_mb={self.limit >> 20}"]
        seeds = [] if any(map(os.path.isfile, options)) else [str(self.seeds)]
        atheris.Setup([sys.argv[0], *limits, *options, *seeds], self.check, custom_mutator=self.mutate)
        atheris.Fuzz()


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main():
    names = [word for word in sys.argv[1:] if word in TARGETS]
    options = [word for word in sys.argv[1:] if word not in TARGETS]
    if not names:
        sys.exit(
            f"usage: {sys.argv[0]} TARGET [TARGET ...] [libFuzzer options]; targets: {', '.join(TARGETS)}"
        )
    if not set(names) <= set(BAD):
        with atheris.instrument_imports(include=["gradsigns_lightning"]):
            import gradsigns_lightning  # noqa: F401  (once, before the forks: it takes seconds)
    failed, parent = [], os.getpid()
    try:
        for name in names:
            sys.stderr.write(f"target {name}\n")
            sys.stderr.flush()
            # A process of its own even for one target, so that its peak memory starts from zero.
            if (child := os.fork()) == 0:
                Fuzzer(name).run(options)
            if os.waitpid(child, 0)[1] != 0:
                failed.append(name)
    finally:
        if os.getpid() == parent:  # libFuzzer ends a child by an exception
            shutil.rmtree(FOLDER)
    sys.stderr.write(f"failed: {', '.join(failed) or 'none'}\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
