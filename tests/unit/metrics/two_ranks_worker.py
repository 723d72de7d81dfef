"""Two data-parallel processes: ``two_ranks_worker.py FOLDER``; each writes what it computed to FOLDER.

They are forked from one that has imported everything and run nothing, which halves the time.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.core import EmbeddingSettings, Watermarker
from gradsigns_lightning.metrics import BitErrorRate, MeanInputGradient, OwnershipPValue, SmallestMargin

SHAPE = (1, 6, 6)
SPLITS = {"even": (3, 3), "uneven": (1, 4), "one_empty": (0, 4), "both_empty": (0, 0)}
METRICS = {
    "ber": lambda: BitErrorRate(),
    "p_value": lambda: OwnershipPValue(),
    "margin": lambda: SmallestMargin(),
    "gradient": lambda: MeanInputGradient(SHAPE),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(64, 3)).double()


def target_images(n: int) -> torch.Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def embedding_gradients(images: torch.Tensor, objective: str, world_size: int) -> list[torch.Tensor]:
    """Loss and parameter gradients of a model that has seen these target images and one of another class."""
    key = WatermarkKey.generate("A", 8, input_shape=SHAPE, target_class=1, n_carriers=30, secret=bytes(32))
    settings = EmbeddingSettings(objective=objective, engine="double_backward", cadence=1, n_images=8)
    watermarker = Watermarker(key, settings)
    watermarker.observe(
        torch.cat([images, torch.ones(1, *SHAPE)]).double(), torch.tensor([1] * len(images) + [0]), step=0
    )
    task = nn.Parameter(torch.zeros(1))
    task.grad = torch.ones(1)
    watermarker.observe_gradients(0, [task], step=0)
    model = network()
    loss = watermarker.loss(model, model, step=0, epoch=0, world_size=world_size)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def metric_inputs(name: str, i: int) -> tuple[torch.Tensor, ...]:
    """Arguments of update number ``i``."""
    generator = torch.Generator().manual_seed(100 + i)
    bits = torch.randint(2, (2, 32), generator=generator)
    if name == "gradient":
        return (torch.randn(i % 3, *SHAPE, generator=generator),)  # an update may have no image at all
    guess = torch.where(torch.rand(2, 32, generator=generator) < 0.2, 1 - bits, bits)
    return (torch.randn(2, 32, generator=generator) if name == "margin" else guess), bits


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for split, (first, second) in SPLITS.items():
        images = target_images(first + second)
        for objective in ("margin", "paper"):
            own = embedding_gradients(
                images[:first] if rank == 0 else images[first:], objective, world_size=2
            )
            for tensor in own:  # what data-parallel training does with gradients
                dist.all_reduce(tensor)
                tensor /= 2
            results[f"{split}/{objective}"] = own
    for name, make in METRICS.items():
        metric = make()
        for i in range(rank, 6, 2):
            metric.update(*metric_inputs(name, i))
        results[name] = [metric.compute()]
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(main, args=(Path(sys.argv[1]),), nprocs=2, start_method="fork")
