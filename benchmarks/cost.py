"""What the mark costs: time and memory relative to the unmarked twin, and how an embedding step grows.

``overhead`` measures time and peak memory relative to the twin, also of the published recipe; ``scaling`` an
embedding step against bits, carriers, classes, batch size and input size; ``ranks`` the time relative to the
twin on 1, 2 and 4 processes (ddp, gloo, CPU); ``plot`` draws docs/cost.svg from docs/cost.json:

    python benchmarks/cost.py overhead
    python benchmarks/cost.py scaling
    python benchmarks/cost.py ranks
    python benchmarks/cost.py plot

Every command but the last writes its section of ``--json`` (docs/cost.json). Batches are random numbers in
memory: the training step alone is measured, without a data loader's time, which would make ratios smaller.
Uses a GPU if there is one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from gradsigns_lightning import Cadence, GradSigns, WatermarkKey
from gradsigns_lightning.core import EmbeddingSettings, Watermarker
from gradsigns_lightning.core.signature import SignatureProjector
from gradsigns_lightning.models import Classifier, ResNet20, SmallResNet

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, WARM_UP = 128, 5


def random_key(n_bits: int, shape: tuple[int, ...], n_carriers: int | None = None) -> WatermarkKey:
    """Return a fresh key for standardised inputs of this shape."""
    return WatermarkKey.generate(
        "benchmark", n_bits, input_shape=shape, target_class=0, n_carriers=n_carriers
    )


def random_batch(shape: tuple[int, ...], size: int = BATCH, n_classes: int = 10) -> tuple[Tensor, Tensor]:
    """Return random images, labelled with the classes in turn."""
    return torch.randn(size, *shape), torch.arange(size) % n_classes


class Published(Classifier):
    """The published recipe (GradSigns, MLSys 2021, released code).

    Every step takes a second-order gradient of the whole batch.
    """

    def __init__(self, network: nn.Module, key: WatermarkKey) -> None:
        super().__init__(network, 10)
        self.mark = SignatureProjector.from_key(key, device=DEVICE)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return cross-entropy plus 0.3 times the binary cross-entropy of the bits, statistics not frozen."""
        images, labels = batch[0].requires_grad_(), batch[1]
        loss = F.cross_entropy(self(images), labels)
        (gradients,) = torch.autograd.grad(loss * len(images), images, create_graph=True)
        held = gradients[labels == 0].mean(0).flatten()[self.mark.carriers]
        return loss + 0.3 * F.binary_cross_entropy_with_logits(
            self.mark.projection @ held, (self.mark.signs + 1) / 2
        )


@dataclass(frozen=True)
class Workload:
    """What is trained, and how often it embeds.

    Attributes:
        name: its name in the results.
        network: makes the network.
        shape: shape of an input.
        n_images: images of an embedding step.
        every: steps from one embedding step to the next.
        n_intervals: how many such intervals a timed chunk has.
    """

    name: str
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    n_images: int
    every: int
    n_intervals: int

    def side(self, side: str, cadence: Cadence) -> tuple[Classifier, list[L.Callback]]:
        """Return module and callbacks of the ``unmarked``, ``signed`` or ``published`` training.

        All have the same initial weights.
        """
        L.seed_everything(0, verbose=False)
        key = random_key(128, self.shape)
        if side == "published":
            return Published(self.network(), key), []
        module = Classifier(self.network(), 10, label_smoothing=0.1)
        return module, [GradSigns(key, cadence=cadence, n_images=self.n_images)] if side == "signed" else []


# As many images as often as a long training embeds by default while its margins grow.
WORKLOADS = (
    Workload("Fashion-MNIST size, small ResNet", lambda: SmallResNet(1, 10), (1, 28, 28), 32, 80, 3),
    Workload("CIFAR-10 size, ResNet-20", lambda: ResNet20(3, 10, bn_momentum=0.1), (3, 32, 32), 32, 80, 1),
)


def now() -> float:
    """Return the time in seconds when the device has finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class StepTimer(L.Callback):
    """Times the batches after the warm-up.

    Rank 0 writes the seconds to a file, because spawned processes return nothing.
    """

    def __init__(self, path: str) -> None:
        self.path, self.start = path, 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        if batch_idx == WARM_UP:
            self.start = now()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop the clock."""
        if trainer.global_rank == 0:
            Path(self.path).write_text(str(now() - self.start))


def train(
    module: Classifier, callbacks: list[L.Callback], shape: tuple[int, ...], n_steps: int, **settings: Any
) -> None:
    """Train on random batches."""
    batches = [random_batch(shape) for _ in range(4)]
    L.Trainer(
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accelerator": DEVICE.type, "devices": 1, **settings},
    ).fit(module, DataLoader([batches[i % 4] for i in range(n_steps)], batch_size=None))


def seconds_per_step(workload: Workload, side: str, n_steps: int, cadence: Cadence, **settings: Any) -> float:
    """Return the mean time of a training step.

    ``n_steps`` must be a multiple of the cadence, so that embedding steps have their share.
    """
    module, callbacks = workload.side(side, cadence)
    with tempfile.NamedTemporaryFile() as file:
        train(module, [*callbacks, StepTimer(file.name)], workload.shape, WARM_UP + n_steps, **settings)
        return float(Path(file.name).read_text()) / n_steps


def embedding_share(workload: Workload, cadence: Cadence, n_steps: int) -> dict[str, float]:
    """Return the shares of the training's time that the watermarker takes, and the seconds of its trial."""
    module, callbacks = workload.side("signed", cadence)
    marker = callbacks[0].watermarker  # type: ignore[attr-defined]
    spent = dict.fromkeys(("observe", "observe_gradients", "loss", "prepare"), 0.0)

    def timed(name: str) -> Callable[..., Any]:
        function = getattr(marker, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            start = now()
            result = function(*args, **kwargs)
            spent[name] += now() - start
            return result

        return call

    for name in spent:
        setattr(marker, name, timed(name))
    start = now()
    train(module, callbacks, workload.shape, n_steps)
    total = now() - start - spent["prepare"]
    return {
        "embedding_pass": spent["loss"] / total,
        "buffer": spent["observe"] / total,
        "task_gradient": spent["observe_gradients"] / total,
        "trial_on_the_first_batch_s": spent["prepare"],
    }


def peak_bytes(workload: Workload, side: str) -> int:
    """Return the most memory that tensors held at once during training steps that embed."""
    module, callbacks = workload.side(side, Cadence(1))
    train(module, callbacks, workload.shape, 2)  # the optimizer's state exists from the first step on
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        train(module, callbacks, workload.shape, 3)
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        train(module, callbacks, workload.shape, 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    in_use, peak = 0, 0
    for event in sorted(events, key=lambda e: e["ts"]):
        in_use += event["args"]["Bytes"]
        peak = max(peak, in_use)
    return peak


def summary(values: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high, "n": len(values)}


def overhead(n_pairs: int = 16) -> dict[str, Any]:
    """Compare signed and published training with the unmarked twin, in interleaved chunks of equal work."""
    results = {}
    for workload in WORKLOADS:
        n_steps, cadence = workload.every * workload.n_intervals, Cadence(workload.every)
        work = {"unmarked": n_steps, "signed": n_steps, "published": max(n_steps // 7, 1)}
        seconds: dict[str, list[float]] = {side: [] for side in work}
        for pair in range(n_pairs):
            for side in list(work)[:: 1 if pair % 2 else -1]:
                seconds[side].append(seconds_per_step(workload, side, work[side], cadence))
        memory = {side: peak_bytes(workload, side) for side in work}
        results[workload.name] = {
            "ms_per_step": {side: 1e3 * statistics.median(s) for side, s in seconds.items()},
            "time_ratio": {
                s: summary([a / b for a, b in zip(seconds[s], seconds["unmarked"], strict=True)])
                for s in work
            },
            "peak_bytes": memory,
            "memory_ratio": {side: memory[side] / memory["unmarked"] for side in work},
            "share_of_time": embedding_share(workload, cadence, n_steps),
        }
        print(workload.name, json.dumps(results[workload.name], indent=1), flush=True)
    return results


class Cell:
    """One setting of the scaling study: an ordinary training step and an embedding pass, timed in turn."""

    def __init__(
        self, shape: tuple[int, ...], *, n_bits: int = 128, n_carriers: int | None = None, **sizes: int
    ) -> None:
        n_classes, n_images, batch = (
            sizes.get("n_classes", 10),
            sizes.get("n_images", 32),
            sizes.get("batch", BATCH),
        )
        self.network = SmallResNet(shape[0], n_classes).to(DEVICE)
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-3)
        self.batch = move_data_to_device(random_batch(shape, batch, n_classes), DEVICE)
        settings = EmbeddingSettings(cadence=1, n_images=n_images, engine="double_backward")
        self.marker = Watermarker(random_key(n_bits, shape, n_carriers), settings)
        images = torch.randn(n_images, *shape, device=DEVICE)
        self.marker.observe(images, torch.zeros(n_images, dtype=torch.long, device=DEVICE), step=0)
        self.ordinary()
        self.marker.observe_gradients(0, self.network.parameters(), step=0)
        self.step = 0

    def ordinary(self) -> None:
        """Take a training step."""
        images, labels = self.batch
        self.optimizer.zero_grad()
        F.cross_entropy(self.network(images), labels).backward()
        self.optimizer.step()

    def embedding(self) -> None:
        """Compute the embedding loss and its gradients."""
        self.step += 1
        self.marker.loss(self.network, self.network, step=self.step, epoch=0).backward()

    def time(self, name: str) -> float:
        """Return the milliseconds of an ``ordinary`` or ``embedding`` step."""
        start = now()
        getattr(self, name)()
        return 1e3 * (now() - start)


STUDIES: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "bits": [
        (n, {"shape": (3, 96, 96), "n_bits": n, "n_images": 16, "batch": 32})
        for n in (16, 64, 256, 1024, 4096)
    ],
    "carriers": [
        (n, {"shape": (3, 96, 96), "n_carriers": n, "n_images": 16, "batch": 32})
        for n in (256, 768, 3072, 12288, 24576)
    ],
    "classes": [(n, {"shape": (3, 32, 32), "n_classes": n}) for n in (10, 100, 1000)],
    "batch size": [(n, {"shape": (3, 32, 32), "batch": n}) for n in (32, 64, 128, 256, 512)],
    "images embedded": [(n, {"shape": (3, 32, 32), "n_images": n}) for n in (8, 16, 32, 64)],
    # Fixed work: the same number of pixels in a batch and in an embedding step.
    "input size": [
        (n, {"shape": (3, n, n), "n_images": 4 * 224**2 // n**2, "batch": 16 * 224**2 // n**2})
        for n in (32, 56, 112, 224)
    ],
}


def scaling(
    n_rounds: int = 9, studies: dict[str, list[tuple[int, dict[str, Any]]]] = STUDIES
) -> dict[str, Any]:
    """Time an embedding pass, one size changed at a time."""
    results: dict[str, Any] = {}
    for name, cells in studies.items():
        made = {value: Cell(**settings) for value, settings in cells}
        taken: dict[int, dict[str, list[float]]] = {
            value: {"ordinary": [], "embedding": []} for value in made
        }
        for round_ in range(n_rounds + 1):
            for value, cell in made.items():
                for step, values in taken[value].items():
                    milliseconds = cell.time(step)
                    if round_:  # the first derives the key's tensors
                        values.append(milliseconds)
        results[name] = {
            value: {step: statistics.median(v) for step, v in steps.items()} for value, steps in taken.items()
        }
        print(name, json.dumps(results[name]), flush=True)
    return results


def ranks(n_pairs: int = 10) -> dict[str, Any]:
    """Compare signed training with the twin on several processes, one thread each."""
    torch.set_num_threads(1)
    every, results = WORKLOADS[0].every, {}
    for n in (1, 2, 4):
        settings = {"accelerator": "cpu", "devices": n, "strategy": "ddp_spawn" if n > 1 else "auto"}
        ratios = []
        for pair in range(n_pairs):
            order = ["signed", "unmarked"][:: 1 if pair % 2 else -1]
            took = {
                side: seconds_per_step(WORKLOADS[0], side, every, Cadence(every), **settings)
                for side in order
            }
            ratios.append(took["signed"] / took["unmarked"])
        results[n] = summary(ratios)
        print(n, results[n], flush=True)
    return results


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the ratios and the scaling."""
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file, with text as text.
    matplotlib.rcParams.update(
        {"svg.hashsalt": "gradsigns", "svg.fonttype": "none", "font.family": "sans-serif"}
    )
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(15, 6.4), layout="constrained")
    _bars(
        axes[0, 0],
        "training time / unmarked twin",
        {n: r["time_ratio"] for n, r in results["overhead"].items()},
        "median",
    )
    _bars(
        axes[0, 1],
        "peak memory / unmarked twin",
        {n: r["memory_ratio"] for n, r in results["overhead"].items()},
        None,
    )
    for axis, (name, cells) in zip(axes.flat[2:], results["scaling"].items(), strict=True):
        sizes = [int(size) for size in cells]
        for label, colour in (("embedding", "tab:blue"), ("ordinary", "tab:grey")):
            axis.plot(sizes, [c[label] for c in cells.values()], "o-", color=colour, label=f"{label} step")
        axis.set(xscale="log", xlabel=name, title=f"milliseconds by {name}")
        axis.set_xticks(sizes, sizes, fontsize=8)
        axis.minorticks_off()
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    axes[0, 2].legend(loc="lower right", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def _bars(axis: Any, title: str, groups: dict[str, Any], field: str | None) -> None:
    sides = {"unmarked": "tab:grey", "signed": "tab:blue", "published": "tab:orange"}
    for row, group in enumerate(groups.values()):
        for column, (side, colour) in enumerate(sides.items()):
            value = group[side][field] if field else group[side]
            axis.bar(row + 0.27 * (column - 1), value, 0.25, color=colour, label=side if row == 0 else None)
            axis.text(row + 0.27 * (column - 1), value, f"{value:.3f}", ha="center", va="bottom", fontsize=8)
    axis.set(
        title=title, xticks=range(len(groups)), xticklabels=[name.replace(", ", "\n") for name in groups]
    )
    axis.set_ylim(top=1.2 * axis.get_ylim()[1])
    axis.legend(loc="upper center", ncols=3, frameon=False, handlelength=1, columnspacing=1, fontsize=9)


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["overhead", "scaling", "ranks", "plot"])
    parser.add_argument("--json", type=Path, default=Path("docs/cost.json"))
    parser.add_argument("--svg", type=Path, default=Path("docs/cost.svg"))
    arguments = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    os.environ["PYTHONWARNINGS"] = "ignore"  # of spawned processes
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    if arguments.command == "plot":
        plot(results, arguments.svg)
        return
    results[arguments.command] = {"overhead": overhead, "scaling": scaling, "ranks": ranks}[
        arguments.command
    ]()
    results.setdefault("where", {})[arguments.command] = {
        "device": str(DEVICE),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
