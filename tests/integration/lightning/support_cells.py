"""Cells of the support table: one small fit each, on real digits.

The processes of a distributed cell can import it.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from signed_digits import TARGET, DealtNet, make_key, make_mark, make_trainer, mlp, train_set, val_set
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from gradsigns_lightning import MarginObjective, verify
from gradsigns_lightning.integration import signed_step


class Rows(nn.Module):
    """The image's rows as a sequence."""

    def __init__(self, recurrent):
        super().__init__()
        self.recurrent, self.head = recurrent(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.recurrent(x.squeeze(1))[0][:, -1])


class VisionTransformer(nn.Module):
    """Rows as tokens, PyTorch's own encoder: fused attention and layer norm."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(8, 32)
        self.position = nn.Parameter(0.1 * torch.randn(8, 32))
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x.squeeze(1)) + self.position).mean(1))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Tanh())
        self.head = nn.Linear(48, 10)
        self.reentrant = reentrant

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


class OnceOnly(torch.autograd.Function):
    """An operation whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


class KeepsAside(torch.autograd.Function):
    """An operation whose backward pass can be differentiated, but treats the slope as a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 1 - x.tanh() ** 2
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope


class WithFunction(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.head = nn.Linear(64, 48), nn.Linear(48, 10)
        self.function = function

    def forward(self, x):
        return self.head(self.function.apply(self.first(x.flatten(1))))


class Adapted(nn.Module):
    """A frozen layer with a trained low-rank adapter, as in LoRA."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.down, self.up, self.head = (
            nn.Linear(64, 8, bias=False),
            nn.Linear(8, 64, bias=False),
            nn.Linear(64, 10),
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(torch.tanh(self.frozen(x) + self.up(self.down(x))))


def cnn(norm=lambda: nn.BatchNorm2d(16), activation=nn.ReLU):
    """Convolutions with a normalization layer."""
    return nn.Sequential(
        *(
            nn.Conv2d(1, 16, 3, padding=1),
            norm(),
            activation(),
            nn.Conv2d(16, 16, 3, padding=1),
            activation(),
        ),
        *(nn.Flatten(), nn.Linear(1024, 10)),
    )


def frozen_backbone():
    net = mlp()
    net[1].requires_grad_(False)
    return net


def parametrised():
    net = cnn()
    parametrizations.weight_norm(net[0])
    parametrizations.spectral_norm(net[3])
    return net


def compiled():
    return torch.compile(cnn(), backend="aot_eager")


MODELS = {
    "MLP (tanh)": mlp,
    "CNN, BatchNorm, ReLU": cnn,
    "CNN, GroupNorm, ReLU": lambda: cnn(lambda: nn.GroupNorm(4, 16)),
    "CNN, LayerNorm, GELU": lambda: cnn(lambda: nn.LayerNorm([16, 8, 8]), nn.GELU),
    "CNN, InstanceNorm, GELU": lambda: cnn(lambda: nn.InstanceNorm2d(16), nn.GELU),
    "transformer, fused attention": VisionTransformer,
    "LSTM": lambda: Rows(nn.LSTM),
    "GRU": lambda: Rows(nn.GRU),
    "activation checkpointing": lambda: Checkpointed(reentrant=False),
    "activation checkpointing, reentrant": lambda: Checkpointed(reentrant=True),
    "frozen backbone": frozen_backbone,
    "low-rank adapter (LoRA)": Adapted,
    "weight norm, spectral norm": parametrised,
    "torch.compile": compiled,
    "once-differentiable operation": lambda: WithFunction(OnceOnly),
    "operation whose second derivative is wrong": lambda: WithFunction(KeepsAside),
}


class CpuFSDP(FSDPStrategy):
    """FSDP1 on the CPU, which Lightning offers for GPUs only."""

    root_device = torch.device("cpu")

    def _setup_model(self, model):
        original = FullyShardedDataParallel.__init__

        def on_cpu(self, *args, **settings):
            original(self, *args, **(settings | {"device_id": torch.device("cpu")}))

        FullyShardedDataParallel.__init__ = on_cpu
        try:
            return super()._setup_model(model)
        finally:
            FullyShardedDataParallel.__init__ = original


class CpuModelParallel(ModelParallelStrategy):
    root_device = torch.device("cpu")

    def _determine_device_ids(self):
        return None


def make_strategy(name, world_size):
    gloo = {"process_group_backend": "gloo"}
    return {
        "one process": lambda: "auto",
        "ddp": lambda: DDPStrategy(**gloo),
        "ddp_find_unused_parameters_true": lambda: DDPStrategy(find_unused_parameters=True, **gloo),
        "ddp, static graph": lambda: DDPStrategy(static_graph=True, **gloo),
        "fsdp (FSDP1)": lambda: CpuFSDP(state_dict_type="full", **gloo),
        "fsdp (FSDP1), layers wrapped apart": lambda: CpuFSDP(
            auto_wrap_policy={nn.Linear, nn.Conv2d}, state_dict_type="full", **gloo
        ),
        "ModelParallelStrategy (FSDP2)": lambda: CpuModelParallel(
            data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False, **gloo
        ),
        "ModelParallelStrategy, tensor parallel": lambda: CpuModelParallel(
            data_parallel_size=1, tensor_parallel_size=world_size, save_distributed_checkpoint=False, **gloo
        ),
    }[name]()


# All target images of a fit, so that the ranks' buffers hold together what one process's buffer holds. The
# sampler deals in turn: every second rank has no image of the target class at all.
N_IMAGES = 180


class CellNet(DealtNet):
    """Shards its layers under FSDP2, as a user's module does."""

    def __init__(self, net, *, fsdp2):
        super().__init__(train_set(600), val_set(), 40)
        self.net = net
        self.fsdp2 = fsdp2
        self.sharded = False

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_model(self):
        if not self.fsdp2 or self.sharded:
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for child in self.net.children():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh)
        fully_shard(self, mesh=mesh)
        self.sharded = True


class FirstEpoch(L.Callback):
    """Keeps the weights of the first epoch.

    Later epochs amplify the rounding errors of another order of summation.
    """

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            state = trainer.strategy.lightning_module_state_dict()
            self.weights = {k.removeprefix("net."): v.float().clone() for k, v in state.items()}


@contextmanager
def as_if_sharded():
    """Let one process embed as the ranks of a sharded training do.

    They estimate the length of the objective's gradient.
    """
    original, signed_step.is_sharded = signed_step.is_sharded, lambda trainer: True
    try:
        yield
    finally:
        signed_step.is_sharded = original


def run_cell(model, engine, precision="32-true", strategy="one process", *, world_size=1):
    """Fit, read on held-out images, and return the result and the weights after the first epoch."""
    torch.manual_seed(0)
    torch.compiler.reset()
    key = make_key(8)
    net = CellNet(MODELS[model](), fsdp2=strategy.startswith("ModelParallel"))
    mark = make_mark(
        key,
        strength=1.0,
        engine=engine,
        objective=MarginObjective(1.0),
        n_images=N_IMAGES,
        momentum=0.5,
        cadence=1,
    )
    first = FirstEpoch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(
            mark,
            first,
            strategy=make_strategy(strategy, world_size),
            devices=world_size,
            precision=precision,
            max_epochs=3,
        )
        try:
            trainer.fit(net)
        except ValueError as error:
            if not str(error).startswith("GradSigns cannot"):
                raise
            return {"outcome": "refused: " + str(error).split("\n")[1].removeprefix("  - ")}
        weights = trainer.strategy.lightning_module_state_dict()
        if trainer.global_rank:
            return {}
        copy = MODELS[model]()
        state = {k.removeprefix("net."): v.float() for k, v in weights.items()}
        getattr(copy, "_orig_mod", copy).load_state_dict(
            {k.removeprefix("_orig_mod."): v for k, v in state.items()}
        )
        images, labels = val_set().tensors
        result = verify(copy, key, (images * 0.4 + 0.3).clamp(0, 1)[labels == TARGET])
    return {
        "outcome": f"BER {result.bit_error_rate:.3g}",
        "engine": mark.watermarker.engine.name,
        "logged": float(trainer.callback_metrics["wm/ber"]),
        "weights": first.weights,
    }
