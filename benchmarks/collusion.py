"""Who is caught, and whether anybody innocent is ever named, when customers mix their copies.

    python benchmarks/collusion.py simulate --out simulated.json   # bits alone, every mixture; 15 minutes on a slow core
    python benchmarks/collusion.py null --out null.json            # innocents found in mixtures, against alpha; 3 minutes
    python benchmarks/collusion.py real --out real.json            # trained copies and mixtures of their weights; 25 minutes

Finished cells are kept in the file and not run again; ``real`` keeps its networks in a folder beside it. Prints Markdown tables.

``simulate`` and ``null`` mix what the copies' bits show. Adding weights up does so nearly linearly; choices bit by bit need a thief
who knows carriers and projection. The mixtures are those of the literature on collusion: where the members agree, a bit stays
(the marking assumption; Boneh and Shaw, IEEE Trans. Inform. Theory 44, 1998); elsewhere the majority, the minority, any member's (interleaving)
or a coin decides (Tardos, J. ACM 55, 2008); of values as read the maximum, minimum, median, minimum + maximum - median and one
of both ends at random (Zhao, Wu, Wang and Liu, IEEE Trans. Image Processing 14, 2005). A subtracted copy, A + B - C, framed
the customer a ^ b ^ c when signatures were the words of a linear code.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
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
from gradsigns_lightning.data import FashionMNIST
from gradsigns_lightning.extraction.sequential import integer_scores
from gradsigns_lightning.extraction.tracing import TraceResult, decode
from gradsigns_lightning.extraction.white_box import read_projections
from gradsigns_lightning.models import MLP, Classifier, SmallResNet

Array = npt.NDArray[np.float64]
State = dict[str, Tensor]
ALPHA, ALPHAS, N_CUSTOMERS = 1e-9, (1e-2, 1e-3, 1e-9), 10_000
NOISES = {"weak": 0.25, "strong": 1.0}  # of the reading, in root mean squares of the mixture
MARGIN_SD, GROUPS, RUNS_PER_MASTER = 0.25, 8, 100


# --- mixtures of copies: evidence of shape (members, bits) to evidence of shape (bits,)


def one_subtracted(n: int) -> Array:
    """Return the weights of A + B - C and its like: all copies but the last with the same weight, the last one subtracted."""
    if n < 3:
        return np.array([2.0, -1.0])[:n] if n == 2 else np.ones(1)
    return np.append(np.ones(n - 1), -1) / (n - 2)


def some_negative(n: int, rng: np.random.Generator) -> Array:
    """Return random weights that add up to one, at least one of them below 0 (of two or more)."""
    while True:
        weights = rng.standard_normal(n)
        weights += (1 - weights.sum()) / n
        if n == 1 or weights.min() < 0:
            return weights


def layer_wise(copies: Array, rng: np.random.Generator) -> Array:
    """Return a mixture with other random positive weights for every group of bits."""
    weights = rng.dirichlet(np.ones(len(copies)), size=GROUPS)
    return (weights[rng.integers(GROUPS, size=copies.shape[1])].T * copies).sum(0)


def where_they_differ(copies: Array, chosen: Array) -> Array:
    """Return the members' bit where they agree, elsewhere the chosen one."""
    bits = np.sign(copies)
    return np.where((bits == bits[0]).all(0), bits[0], chosen)


def coins(copies: Array, rng: np.random.Generator) -> Array:
    """Return a fair coin, 1 or -1, for every bit."""
    return rng.choice([-1.0, 1.0], copies.shape[1])


def votes(copies: Array, rng: np.random.Generator) -> Array:
    """Return the majority's bits, ties by a coin."""
    return np.sign(np.sign(copies).sum(0) + 0.5 * coins(copies, rng))


MIXTURES: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    "average": lambda copies, rng: copies.mean(0),
    "A + B - C": lambda copies, rng: one_subtracted(len(copies)) @ copies,
    "A + B - C, its signs": lambda copies, rng: np.sign(one_subtracted(len(copies)) @ copies),
    "random weights, some negative": lambda copies, rng: some_negative(len(copies), rng) @ copies,
    "layer by layer": layer_wise,
    "majority": votes,
    "minority": lambda copies, rng: where_they_differ(copies, -votes(copies, rng)),
    "interleaving": lambda copies, rng: copies[rng.integers(len(copies), size=copies.shape[1]), np.arange(copies.shape[1])],
    "coin where they differ": lambda copies, rng: where_they_differ(copies, coins(copies, rng)),
    "maximum": lambda copies, rng: copies.max(0),
    "minimum": lambda copies, rng: copies.min(0),
    "median": lambda copies, rng: np.median(copies, 0),
    "minimum + maximum - median": lambda copies, rng: copies.min(0) + copies.max(0) - np.median(copies, 0),
    "minimum or maximum": lambda copies, rng: np.where(coins(copies, rng) > 0, copies.max(0), copies.min(0)),
}


def mixed(name: str, signatures: Array, noise: float, rng: np.random.Generator) -> Array:
    """Return what is read of a mixture of copies that show these signatures (1 and -1) with unequal margins."""
    margins = np.maximum(1 + MARGIN_SD * rng.standard_normal(signatures.shape), 0.2)
    mixture = MIXTURES[name](signatures * margins, rng)
    return mixture + noise * np.sqrt(np.mean(mixture**2)) * rng.standard_normal(mixture.shape)


# --- bits alone


def master_key(n_bits: int, rng: np.random.Generator) -> WatermarkKey:
    """Return a master that follows from the generator."""
    return WatermarkKey.generate("collusion", n_bits, input_shape=(3, 64, 64), target_class=0, secret=rng.bytes(32))


def traced(evidence: Array, master: WatermarkKey, n_customers: int, alpha: float) -> TraceResult:
    """Return whose signature the evidence shows."""
    return decode(evidence, master, n_customers=n_customers, alpha=alpha, n_queries=0, recognised=1.0)


def innocents_of(result: TraceResult, members: Iterable[int]) -> tuple[bool, bool]:
    """Return whether anybody but the members is in ``present``, and whether anybody but them is named."""
    return bool(set(result.present) - set(members)), result.verdict == "owned" and result.customer not in members


def simulated(n_bits: int, name: str, size: int, noise: float, *, runs: int, customers: int, seed: str) -> dict[str, float]:
    """Count over runs who is found in mixtures of ``size`` copies."""
    rng = np.random.default_rng(list(seed.encode()))
    master = master_key(n_bits, rng)
    signs = 2.0 * master.customer_signatures(customers) - 1
    counts = dict.fromkeys(("named", "present", "members found", "nobody", "innocent", "mixed"), 0)
    for _ in range(runs):
        members = rng.choice(customers, size, replace=False).tolist()
        result = traced(mixed(name, signs[members], noise, rng), master, customers, ALPHA)
        found = len(set(result.present) & set(members))
        innocent = any(innocents_of(result, members))
        counts["named"] += result.verdict == "owned" and result.customer in members
        counts["present"] += found > 0
        counts["members found"] += found
        counts["nobody"] += found == 0 and not innocent
        counts["innocent"] += innocent
        counts["mixed"] += result.mixed
    return {"runs": runs, **counts}


def clearest_innocents(evidence: Array, master: WatermarkKey, members: list[list[int]], customers: int) -> list[float]:
    """Return for each reading the smallest p-value of customers who are no members, as ``present`` counts it, its base-10 logarithm."""
    scores = np.array([integer_scores(row) for row in evidence], dtype=np.float32)
    signs = 2 * master.customer_signatures(customers).astype(np.float32) - 1
    totals = signs @ scores.T
    for run, group in enumerate(members):
        totals[group, run] = -np.inf
    signed = signs[totals.argmax(0)] * scores
    return [log10_sign_flip_p_value([int(score) for score in row]) + float(np.log10(customers)) for row in signed]


def null_reading(signs: Array, master_signs: Array, rng: np.random.Generator) -> tuple[list[int], Array]:
    """Return members drawn at random, and what is read of a mixture drawn at random: any noise, a third with the master's mark."""
    members = rng.choice(len(signs), rng.integers(2, 6), replace=False).tolist()
    evidence = mixed(rng.choice(list(MIXTURES)), signs[members], 10 ** rng.uniform(-1, 0.5), rng)
    if rng.random() < 1 / 3:
        evidence = evidence + rng.standard_normal() * np.sqrt(np.mean(evidence**2)) * master_signs
    return members, np.where(rng.random(evidence.shape) < rng.choice([0, 0.2]), 0, evidence)


def null_runs(n_bits: int, *, runs: int, customers: int, seed: str) -> dict[str, Any]:
    """Count at each alpha in how many runs an innocent is in ``present``, and in how many one is named; one master."""
    rng = np.random.default_rng(list(seed.encode()))
    master = master_key(n_bits, rng)
    signs, master_signs = (2.0 * bits - 1 for bits in (master.customer_signatures(customers), master.signature.numpy()))
    members, rows = zip(*(null_reading(signs, master_signs, rng) for _ in range(runs)), strict=True)
    clearest = clearest_innocents(np.array(rows), master, list(members), customers)
    counts = {f"{alpha:g}": [0, 0] for alpha in ALPHAS}
    for group, row, log10_p_value in zip(members, rows, clearest, strict=True):
        for alpha in ALPHAS:
            if log10_p_value <= np.log10(2 * alpha):  # no innocent is near elsewhere, which a test compares with `decode`
                found = innocents_of(traced(row, master, customers, alpha), group)
                counts[f"{alpha:g}"] = [a + b for a, b in zip(counts[f"{alpha:g}"], found, strict=True)]
    return {"runs": runs, "smallest": min(clearest), **counts}


# --- trained copies

DATA = FashionMNIST(batch_size=128, split_seed=0)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(input_shape=(1, 28, 28), n_classes=10, hidden=(256, 128)),
    "small_resnet": lambda: SmallResNet(1, 10),
}
CUSTOMERS = (777, 1234, 4321, 42, 9999)
EPOCHS = {"base": 3, "copy": 3, "fine-tuned": 1}
RATES = {"base": 3e-3, "copy": 1e-3, "fine-tuned": 1e-3}
WEIGHTED: dict[str, Callable[[int], Array]] = {"average": lambda n: np.ones(n) / n, "A + B - C": one_subtracted}


def fitted(network: str, start: State | None, kind: str, seed: int, key: WatermarkKey | None = None) -> State:
    """Return the network's weights after a training of this kind from ``start``, signed if there is a key."""
    L.seed_everything(seed, verbose=False)
    net = NETWORKS[network]()
    if start is not None:
        net.load_state_dict(start)
    optimizer = partial(torch.optim.AdamW, lr=RATES[kind], weight_decay=1e-4)
    L.Trainer(
        max_epochs=EPOCHS[kind],
        accelerator="cpu",
        callbacks=[] if key is None else [GradSigns(key)],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Classifier(net, 10, optimizer=optimizer, label_smoothing=0.1), DATA)
    return net.state_dict()


def weighted(states: list[State], weights: Array) -> State:
    """Return the weighted sum of the copies' weights."""
    return {
        name: sum(float(w) * s[name] for w, s in zip(weights, states, strict=True)) if first.is_floating_point() else first
        for name, first in states[0].items()
    }


def layers_in_turn(states: list[State]) -> State | None:
    """Return each layer of another copy; None if there are fewer layers than copies."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in states[0]))
    if len(layers) < len(states):
        return None
    return {name: states[layers.index(name.rpartition(".")[0]) % len(states)][name] for name in states[0]}


def judged(net: nn.Module, master: WatermarkKey, members: list[int]) -> dict[str, Any]:
    """Return test accuracy, what ``trace`` says, and the smallest p-value of innocents."""
    net.eval()
    with torch.inference_mode():
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in DATA.test_dataloader())
    images = DATA.raw_images("test", master.target_class)
    result = trace(net, master, images, n_customers=N_CUSTOMERS, alpha=ALPHA)
    evidence, _ = read_projections(net, master, images)
    (innocents,) = clearest_innocents(evidence[None], master, [members], N_CUSTOMERS)
    return {**result.to_dict(), "accuracy": right / 10_000, "members": members, "innocents": innocents}


def mixture_state(name: str, states: list[State], network: str) -> State | None:
    """Return the mixture's weights, the statistics of batch normalisation computed again as a thief would; None if there is none."""
    state = weighted(states, WEIGHTED[name](len(states))) if name in WEIGHTED else layers_in_turn(states)
    if state is None:
        return None
    net = NETWORKS[network]()
    net.load_state_dict(state)
    L.seed_everything(0, verbose=False)
    update_bn((batch for batch, _ in zip(DATA.train_dataloader(), range(100), strict=False)), net)
    return net.state_dict()


def real_cells(networks: list[str], bits: list[int], folder: Path) -> Iterable[tuple[str, Callable[[], Any]]]:
    """Yield every cell's name and what computes it; networks that were trained are read from the folder."""
    folder.mkdir(exist_ok=True)

    def kept(name: str, make: Callable[[], State]) -> State:
        path = folder / f"{name}.pt".replace(" ", "_")
        if not path.exists():
            torch.save(make(), path)
        return torch.load(path, weights_only=True)  # type: ignore[no-any-return]

    def net_of(network: str, state: State) -> nn.Module:
        net = NETWORKS[network]()
        net.load_state_dict(state)
        return net

    def judge(network: str, state: State | None, master: WatermarkKey, members: list[int]) -> dict[str, Any] | None:
        return None if state is None else judged(net_of(network, state), master, members)

    for network, n_bits in product(networks, bits):
        normalisation = {"input_mean": DATA.mean, "input_std": DATA.std}
        master = WatermarkKey.generate("A", n_bits, input_shape=(1, 28, 28), target_class=0, secret=bytes(32), **normalisation)
        base = partial(kept, f"{network} base", partial(fitted, network, None, "base", 0))

        def signed(customer: int, network: str = network, master: WatermarkKey = master, base: Any = base) -> State:
            make = lambda: fitted(network, base(), "copy", customer, customer_key(master, customer))  # noqa: E731
            return kept(f"{network} {master.n_bits} copy {customer}", make)

        cell = f"{network} {n_bits}"
        yield f"{cell} | base | 0 | 0", lambda: judge(network, base(), master, [])
        for customer in CUSTOMERS:
            yield f"{cell} | copy | 1 | {customer}", lambda: judge(network, signed(customer), master, [customer])
        for size, name in product(range(2, 6), (*WEIGHTED, "layer by layer")):
            for turn in range(len(CUSTOMERS) if (size, name) != (5, "average") else 1):
                members = [CUSTOMERS[(turn + i) % len(CUSTOMERS)] for i in range(size)]
                mix = lambda: mixture_state(name, [signed(c) for c in members], network)  # noqa: E731
                yield f"{cell} | {name} | {size} | {turn}", lambda: judge(network, mix(), master, members)
                if turn == 0 and name in WEIGHTED:
                    tuned = lambda: fitted(network, mix(), "fine-tuned", 0)  # noqa: E731
                    yield f"{cell} | {name}, fine-tuned | {size} | 0", lambda: judge(network, tuned(), master, members)
