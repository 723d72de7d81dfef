"""Who is caught, and whether anybody innocent is ever named, when customers mix their copies.

Bits alone, every mixture (10 minutes on a slow core); innocents found in mixtures, against alpha (3 minutes);
trained copies and mixtures of their weights (25 minutes); and how many bits it takes:

    python benchmarks/collusion.py simulate --out simulated.json
    python benchmarks/collusion.py null --out null.json
    python benchmarks/collusion.py real --out real.json
    python benchmarks/collusion.py simulate --out simulated.json --mixtures average --bits 192 320

Finished cells are kept in the file and not run again; ``real`` keeps its networks in a folder beside it.
Prints Markdown tables.

``simulate`` and ``null`` mix the copies' scores, which mixing weights does nearly; choices bit by bit need a
thief who knows carriers and projection. The mixtures are those of the literature on collusion: where the
members agree, a bit stays (the marking assumption; Boneh and Shaw, IEEE Trans. Information Theory 44, 1998);
elsewhere the majority, the minority, any member (interleaving) or a coin decides (Tardos, J. ACM 55, 2008);
of the scores the maximum, the minimum, the median, minimum plus maximum minus median, or either end at random
(Zhao, Wu, Wang and Liu, IEEE Trans. Image Processing 14, 2005). A subtracted copy, A + B - C, framed the
customer a ^ b ^ c when signatures were the words of a linear code.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import binom
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from gradsigns_lightning import GradSigns, WatermarkKey, customer_key, trace
from gradsigns_lightning.core.statistics import log10_sign_flip_p_value
from gradsigns_lightning.data import FashionMNIST, ImageDataModule
from gradsigns_lightning.models import MLP, Classifier, SmallResNet
from gradsigns_lightning.verification.api.sequential import integer_scores
from gradsigns_lightning.verification.tracing import decode
from gradsigns_lightning.verification.white_box import read_projections

Array = npt.NDArray[np.float64]
State = dict[str, Tensor]
Reading = tuple[list[int], Array]  # members, and the scores of their mixture
ALPHA, ALPHAS, N_CUSTOMERS = 1e-9, (1e-2, 1e-3, 1e-9), 10_000
NOISES = {"weak": 0.25, "strong": 1.0}  # of the reading, in root mean squares of the mixture
NOBODY = {"customer": 0, "present": (), "verdict": "not_proven", "mixed": False}
MARGIN_SD, GROUPS, RUNS_PER_MASTER = 0.25, 8, 100


# --- mixtures of copies: scores of shape (members, bits) to scores of shape (bits,)


def one_subtracted(n: int) -> Array:
    """Return the weights of A + B - C and its like: the last copy is subtracted, the others weigh alike."""
    if n < 3:
        return np.array([2.0, -1.0])[:n] if n == 2 else np.ones(1)
    return np.append(np.ones(n - 1), -1) / (n - 2)


def some_negative(n: int, rng: np.random.Generator) -> Array:
    """Return random weights that add up to one; of two or more, at least one is below 0."""
    while True:
        weights = rng.standard_normal(n)
        weights += (1 - weights.sum()) / n
        if n == 1 or weights.min() < 0:
            return weights


def layer_wise(copies: Array, rng: np.random.Generator) -> Array:
    """Return a mixture with different random positive weights for every group of bits."""
    weights = rng.dirichlet(np.ones(len(copies)), size=GROUPS)
    return (weights[rng.integers(GROUPS, size=copies.shape[1])].T * copies).sum(0)


def where_they_differ(copies: Array, chosen: Array) -> Array:
    """Return the members' bit where they agree, elsewhere the chosen one."""
    bits = np.sign(copies)
    return np.where((bits == bits[0]).all(0), bits[0], chosen)


def random_signs(copies: Array, rng: np.random.Generator) -> Array:
    """Return a random sign, 1 or -1, for every bit."""
    return rng.choice([-1.0, 1.0], copies.shape[1])


def votes(copies: Array, rng: np.random.Generator) -> Array:
    """Return the majority's bits, ties at random."""
    return np.sign(np.sign(copies).sum(0) + 0.5 * random_signs(copies, rng))


MIXTURES: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    "average": lambda copies, rng: copies.mean(0),
    "A + B - C": lambda copies, rng: one_subtracted(len(copies)) @ copies,
    "A + B - C, its signs": lambda copies, rng: np.sign(one_subtracted(len(copies)) @ copies),
    "random weights, some negative": lambda copies, rng: some_negative(len(copies), rng) @ copies,
    "layer by layer": layer_wise,
    "majority": votes,
    "minority": lambda copies, rng: where_they_differ(copies, -votes(copies, rng)),
    "interleaving": lambda copies, rng: copies[
        rng.integers(len(copies), size=copies.shape[1]), np.arange(copies.shape[1])
    ],
    "coin where they differ": lambda copies, rng: where_they_differ(copies, random_signs(copies, rng)),
    "maximum": lambda copies, rng: copies.max(0),
    "minimum": lambda copies, rng: copies.min(0),
    "median": lambda copies, rng: np.median(copies, 0),
    "minimum + maximum - median": lambda copies, rng: copies.min(0) + copies.max(0) - np.median(copies, 0),
    "minimum or maximum": lambda copies, rng: np.where(
        random_signs(copies, rng) > 0, copies.max(0), copies.min(0)
    ),
}


def mixed(name: str, signatures: Array, noise: float, rng: np.random.Generator) -> Array:
    """Return the scores of a mixture of copies with these signatures (1 and -1) and unequal margins."""
    margins = np.maximum(1 + MARGIN_SD * rng.standard_normal(signatures.shape), 0.2)
    mixture = MIXTURES[name](signatures * margins, rng)
    return mixture + noise * np.sqrt(np.mean(mixture**2)) * rng.standard_normal(mixture.shape)


# --- bits alone


def master_key(n_bits: int, rng: np.random.Generator) -> WatermarkKey:
    """Return a master that follows from the generator."""
    return WatermarkKey.generate(
        "collusion", n_bits, input_shape=(3, 64, 64), target_class=0, secret=rng.bytes(32)
    )


def traced(reading: Reading, master: WatermarkKey, customers: int, alpha: float) -> dict[str, int]:
    """Return the outcome of a reading."""
    members, scores = reading
    return outcome(
        vars(decode(scores, master, n_customers=customers, alpha=alpha, n_queries=0, recognised=1.0)),
        members,
    )


def outcome(said: dict[str, Any], members: list[int]) -> dict[str, int]:
    """Return how many members and innocents ``trace`` found, from its result ``said``."""
    present, owned = set(said["present"]), said["verdict"] == "owned"
    innocent_present, innocent_named = bool(present - set(members)), owned and said["customer"] not in members
    return {
        "named": owned and not innocent_named,
        "present": bool(present & set(members)),
        "members found": len(present & set(members)),
        "innocent present": innocent_present,
        "innocent named": innocent_named,
        "nobody": not (present or owned),
        "mixed": said["mixed"],
    }


def added(counts: list[dict[str, int]]) -> dict[str, int]:
    """Return the sums of counts, and their number as ``runs``."""
    return {name: sum(count.get(name, 1) for count in counts) for name in ("runs", *counts[0])}


def clearest(
    readings: list[Reading], master: WatermarkKey, customers: int, *, members_too: bool
) -> list[float]:
    """Return each reading's smallest p-value of all customers or of innocents, times their number.

    The values are base-10 logarithms.
    """
    scores = np.array([integer_scores(values) for _, values in readings], dtype=np.float32)
    signs = 2 * master.customer_signatures(customers).astype(np.float32) - 1
    totals = signs @ scores.T
    for run, (members, _) in enumerate(readings):
        if not members_too:
            totals[members, run] = -np.inf
    signed = signs[totals.argmax(0)] * scores
    return [
        log10_sign_flip_p_value([int(score) for score in row]) + float(np.log10(customers)) for row in signed
    ]


def simulated(
    bits: int, noise: str, mixture: str, size: int, *, runs: int, customers: int, seed: str
) -> dict[str, int]:
    """Count who is found in mixtures of ``size`` copies; one master."""
    rng = np.random.default_rng(list(seed.encode()))
    master = master_key(bits, rng)
    signs = 2.0 * master.customer_signatures(customers) - 1
    groups = [rng.choice(customers, size, replace=False).tolist() for _ in range(runs)]
    readings: list[Reading] = [(group, mixed(mixture, signs[group], NOISES[noise], rng)) for group in groups]
    values = clearest(readings, master, customers, members_too=True)
    # `decode` takes longer, and is not needed where nobody is near.
    return added(
        [
            traced(reading, master, customers, ALPHA)
            if value <= np.log10(2 * ALPHA)
            else outcome(NOBODY, reading[0])
            for reading, value in zip(readings, values, strict=True)
        ]
    )


def null_reading(signs: Array, master_signs: Array, rng: np.random.Generator) -> Reading:
    """Return random members and the scores of a random mixture of theirs.

    The noise is random; a third of the mixtures carries the master's own mark too.
    """
    members = rng.choice(len(signs), rng.integers(2, 6), replace=False).tolist()
    scores = mixed(rng.choice(list(MIXTURES)), signs[members], 10 ** rng.uniform(-1, 0.5), rng)
    if rng.random() < 1 / 3:
        scores = scores + rng.standard_normal() * np.sqrt(np.mean(scores**2)) * master_signs
    return members, np.where(rng.random(scores.shape) < rng.choice([0, 0.2]), 0, scores)


def null_runs(bits: int, *, runs: int, customers: int, seed: str) -> dict[str, list[int]]:
    """Count the runs with an innocent in ``present`` and those that name one, at each alpha; one master."""
    rng = np.random.default_rng(list(seed.encode()))
    master = master_key(bits, rng)
    signs, master_signs = (
        2.0 * part - 1 for part in (master.customer_signatures(customers), master.signature.numpy())
    )
    readings = [null_reading(signs, master_signs, rng) for _ in range(runs)]
    values = clearest(readings, master, customers, members_too=False)
    counts = {}
    for alpha in ALPHAS:
        near = [
            reading for reading, value in zip(readings, values, strict=True) if value <= np.log10(2 * alpha)
        ]
        found = [traced(reading, master, customers, alpha) for reading in near]
        counts[f"{alpha:g}"] = [
            sum(one[name] for one in found) for name in ("innocent present", "innocent named")
        ]
    return counts


# --- trained copies

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(input_shape=(1, 28, 28), n_classes=10, hidden=(256, 128)),
    "small_resnet": lambda: SmallResNet(1, 10),
}
CUSTOMERS = (777, 1234, 4321, 42, 9999)
TRAININGS = {"base": (3, 3e-3), "copy": (1, 1e-3), "fine-tuned": (1, 1e-3)}  # epochs and rate
WEIGHTS: dict[str, Callable[[int], Array]] = {
    "average": lambda n: np.ones(n) / n,
    "A + B - C": one_subtracted,
}
LAYERS, FINE_TUNED = "layer by layer", ", fine-tuned"


def weighted(states: list[State], weights: Array) -> State:
    """Return the weighted sum of the copies' weights."""
    return {
        name: sum(float(w) * s[name] for w, s in zip(weights, states, strict=True))
        if first.is_floating_point()
        else first
        for name, first in states[0].items()
    }


def layers_of(state: State) -> list[str]:
    """Return the names of the modules that hold weights."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in state))


def layers_in_turn(states: list[State]) -> State:
    """Return a network that takes its layers from the copies in turn."""
    layers = layers_of(states[0])
    return {name: states[layers.index(name.rpartition(".")[0]) % len(states)][name] for name in states[0]}


@dataclass(frozen=True)
class Copies:
    """An unmarked network, its customers' copies and mixtures of them.

    Attributes:
        network: name of the network in ``NETWORKS``.
        n_bits: bits of the keys.
        folder: where trained weights are kept.
        data: the data that all are trained on.
    """

    network: str
    n_bits: int
    folder: Path
    data: ImageDataModule

    @property
    def master(self) -> WatermarkKey:
        """The key that the customers' keys are made from."""
        statistics = {"input_mean": self.data.mean, "input_std": self.data.std}
        return WatermarkKey.generate(
            "collusion",
            self.n_bits,
            input_shape=self.data.input_shape,
            target_class=0,
            secret=bytes(32),
            **statistics,
        )

    def plan(self, n_turns: int) -> Iterator[tuple[str, list[int]]]:
        """Yield a kind and its members: each mixture of ``n_turns`` groups, one of them fine-tuned too."""
        yield "base", []
        yield from (("copy", [customer]) for customer in CUSTOMERS)
        for size, kind in product(range(2, len(CUSTOMERS) + 1), (*WEIGHTS, LAYERS)):
            if kind == LAYERS and len(layers_of(NETWORKS[self.network]().state_dict())) < size:
                continue
            turns = [[CUSTOMERS[(turn + i) % len(CUSTOMERS)] for i in range(size)] for turn in range(n_turns)]
            yield from (
                (kind, members)
                for members in turns[: 1 if (kind, size) == ("average", len(CUSTOMERS)) else None]
            )
            if kind in WEIGHTS:
                yield kind + FINE_TUNED, turns[0]

    def state(self, kind: str, members: list[int]) -> State:
        """Return the weights of one item of the plan."""
        if kind == "base":
            return self._kept(f"{self.network}-base", lambda: self._fitted(None, kind, seed=0))
        if kind == "copy":
            key = customer_key(self.master, members[0])
            name = f"{self.network}-{self.n_bits}-{members[0]}"
            return self._kept(
                name, lambda: self._fitted(self.state("base", []), kind, seed=members[0], key=key)
            )
        if kind.endswith(FINE_TUNED):
            return self._fitted(self.state(kind.removesuffix(FINE_TUNED), members), "fine-tuned", seed=0)
        copies = [self.state("copy", [customer]) for customer in members]
        return self._with_new_statistics(
            layers_in_turn(copies) if kind == LAYERS else weighted(copies, WEIGHTS[kind](len(copies)))
        )

    def judged(self, kind: str, members: list[int]) -> dict[str, Any]:
        """Return test accuracy, the result of ``trace``, and log10 of the smallest p-value of innocents."""
        net = self._net(self.state(kind, members)).eval()
        with torch.inference_mode():
            right = torch.cat([net(x).argmax(1) == y for x, y in self.data.test_dataloader()])
        images = self.data.raw_images("test", self.master.target_class)
        result = trace(net, self.master, images, n_customers=N_CUSTOMERS, alpha=ALPHA)
        scores = read_projections(net, self.master, images)[0].numpy()
        (innocents,) = clearest([(members, scores)], self.master, N_CUSTOMERS, members_too=False)
        return {
            "accuracy": float(right.double().mean()),
            "members": members,
            "innocents": innocents,
            **result.to_dict(),
        }

    def _net(self, state: State | None) -> nn.Module:
        net = NETWORKS[self.network]()
        if state is not None:
            net.load_state_dict(state)
        return net

    def _kept(self, name: str, make: Callable[[], State]) -> State:
        path = self.folder / f"{name}.pt"
        if not path.exists():
            self.folder.mkdir(exist_ok=True)
            torch.save(make(), path)
        state: State = torch.load(path, weights_only=True)
        return state

    def _fitted(
        self, start: State | None, training: str, *, seed: int, key: WatermarkKey | None = None
    ) -> State:
        L.seed_everything(seed, verbose=False)
        net, (epochs, rate) = self._net(start), TRAININGS[training]
        L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[] if key is None else [GradSigns(key)],
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(
            Classifier(
                net, 10, optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=1e-4), label_smoothing=0.1
            ),
            self.data,
        )
        return net.state_dict()

    def _with_new_statistics(self, state: State) -> State:
        # As a thief would: the statistics of batch normalization do not fit the mixture's weights.
        L.seed_everything(0, verbose=False)
        net = self._net(state)
        update_bn((images for images, _ in islice(self.data.train_dataloader(), 100)), net)
        return net.state_dict()


# --- cells and tables


def run(path: Path, cells: Iterable[tuple[str, Callable[[], Any]]]) -> dict[str, Any]:
    """Compute the cells that the file does not have yet; return all of ``cells``."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    asked = {}
    for name, compute in cells:
        if name not in kept:
            begun = time.time()
            kept[name] = compute()
            path.write_text(json.dumps(kept, indent=1))
            print(f"# {name}: {time.time() - begun:.1f} s", flush=True)
        asked[name] = kept[name]
    return asked


def table(header: str, rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table; the header's cells are separated by commas."""
    lines = [header.split(", "), ["---"] * (header.count(", ") + 1), *rows]
    return "\n" + "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def simulate(arguments: argparse.Namespace) -> None:
    """Mix bits; print the share of runs with a member in ``present``, in brackets of those that name one."""
    settings = {"runs": arguments.runs, "customers": arguments.customers}
    grid = product(arguments.bits, NOISES, arguments.mixtures, range(1, 6))
    # one copy alone is the same in all mixtures
    wanted = [cell for cell in grid if cell[3] > 1 or cell[2] == "average"]
    names = {" | ".join(map(str, (*cell, *settings.values()))): cell for cell in wanted}
    counted = run(
        arguments.out,
        ((name, partial(simulated, *cell, seed=name, **settings)) for name, cell in names.items()),
    )
    cells = dict(zip(wanted, counted.values(), strict=True))

    def row(*setting: Any) -> Iterator[str]:
        yield setting[-1]
        for size in range(1, 6):
            counts = cells.get((*setting, size))
            yield (
                f"{counts['present'] / counts['runs']:.0%} ({counts['named'] / counts['runs']:.0%})"
                if counts
                else ""
            )

    for bits, noise in product(arguments.bits, NOISES):
        header = f"{bits} bits with {noise} noise, 1 copy, 2, 3, 4, 5"
        print(table(header, (row(bits, noise, mixture) for mixture in arguments.mixtures)).replace("%", " %"))
    print(
        "\nInnocents present: {innocent present}, named: {innocent named}, of {runs} runs.".format(
            **added(list(cells.values()))
        )
    )
    alone = [counts for cell, counts in cells.items() if cell[3] == 1]
    print("Single copies mistaken for mixtures: {mixed} of {runs}.".format(**added(alone)) if alone else "")


def null(arguments: argparse.Namespace) -> None:
    """Draw random mixtures; print how many runs find an innocent, and the probability of so many at alpha."""
    customers, rows = arguments.customers, []
    for bits in arguments.bits:
        sizes = {
            start: min(RUNS_PER_MASTER, arguments.runs - start)
            for start in range(0, arguments.runs, RUNS_PER_MASTER)
        }
        names = {f"{bits} | {start} | {size} | {customers}": size for start, size in sizes.items()}
        counted = run(
            arguments.out,
            (
                (name, partial(null_runs, bits, runs=size, customers=customers, seed=name))
                for name, size in names.items()
            ),
        )
        for alpha in ALPHAS:
            present, named = (
                sum(column) for column in zip(*(cell[f"{alpha:g}"] for cell in counted.values()), strict=True)
            )
            p_value = binom.sf(present - 1, arguments.runs, alpha)
            rows.append(
                [
                    bits,
                    f"{alpha:g}",
                    arguments.runs,
                    f"{alpha * arguments.runs:g}",
                    present,
                    named,
                    f"{p_value:.2g}",
                ]
            )
    print(
        table(
            "bits, alpha, runs, allowed, with an innocent present, with an innocent named, p of so many "
            "present",
            rows,
        )
    )


def real(arguments: argparse.Namespace) -> None:
    """Train copies, mix their weights and print who is found."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder, data = arguments.out.with_suffix(".networks"), FashionMNIST(batch_size=128)
    for network, bits in product(arguments.networks, arguments.bits):
        copies = Copies(network, bits, folder, data)
        plan = {
            f"{network} | {bits} | {kind} | {members}": (kind, members)
            for kind, members in copies.plan(arguments.turns)
        }
        cells = run(arguments.out, ((name, partial(copies.judged, *item)) for name, item in plan.items()))
        groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for name, (kind, members) in plan.items():
            groups.setdefault((kind, len(members)), []).append(cells[name])
        header = f"{network} with {bits} bits, copies, accuracy, tried, a member present, a member named, "
        header += "members found, innocents present or named, innocents' smallest p"
        print(table(header, (summary(*group, results) for group, results in groups.items())))


def summary(kind: str, size: int, results: list[dict[str, Any]]) -> list[Any]:
    """Return a row of the table of trained copies."""
    counts = added([outcome(result, result["members"]) for result in results])
    accuracy = sorted(result["accuracy"] for result in results)
    spread = f"{accuracy[0]:.3f}" + (f" to {accuracy[-1]:.3f}" if len(accuracy) > 1 else "")
    found = f"{counts['members found']} of {size * len(results)}"
    innocents = counts["innocent present"] + counts["innocent named"]
    smallest = min(0.0, *(result["innocents"] for result in results))
    return [
        kind,
        size,
        spread,
        len(results),
        counts["present"],
        counts["named"],
        found,
        innocents,
        f"{10**smallest:.2g}",
    ]


def main() -> None:
    """Run the cells that are missing and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for command, bits in ((simulate, [64, 128, 256]), (null, [64, 128, 256]), (real, [128, 256])):
        options = commands.add_parser(command.__name__)
        options.set_defaults(command=command)
        options.add_argument("--out", type=Path, required=True)
        options.add_argument("--bits", nargs="+", type=int, default=bits)
        if command is simulate:
            options.add_argument("--mixtures", nargs="+", choices=MIXTURES, default=list(MIXTURES))
        if command is real:
            options.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
            options.add_argument(
                "--turns", type=int, choices=range(1, len(CUSTOMERS) + 1), default=len(CUSTOMERS)
            )
        else:
            options.add_argument("--runs", type=int, default=100 if command is simulate else 10_000)
            options.add_argument("--customers", type=int, default=N_CUSTOMERS)
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    main()
