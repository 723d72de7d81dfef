"""What every attack takes and returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from gradsigns_lightning.core.torch_state.contexts import frozen_statistics
from gradsigns_lightning.core.utils.checks import check_choice, check_int, check_number
from gradsigns_lightning.data.sources import Batch, keep_batch

if TYPE_CHECKING:
    from gradsigns_lightning.attacks.own_marks import MakeMark
    from gradsigns_lightning.data.base import ImageDataModule

THIEF_SHARE, THIEF_SEED = 1 / 3, 1337  # of the Watermark-Robustness-Toolbox (Lukas et al., IEEE S&P 2022)
OPTIMIZERS, SCHEDULES = ("adamw", "sgd"), ("onecycle", "cosine", "constant")
Observe = Callable[[float, nn.Module], None]


@dataclass(frozen=True)
class Recipe:
    """How networks of the stolen kind are trained, which a thief is taken to know.

    Attributes:
        rate: highest learning rate of a training from scratch, > 0.
        epochs: epochs of such a training, >= 1.
        batch_size: images a batch, >= 1.
        weight_decay: decoupled weight decay (AdamW) or L2 penalty (SGD), >= 0.
        optimizer: ``"adamw"`` or ``"sgd"`` with momentum 0.9.
        schedule: ``"onecycle"``, ``"cosine"`` (down to zero) or ``"constant"``.
        label_smoothing: share of each target that is spread over all classes, in [0, 1].

    Raises:
        ValueError: a value is out of range.
    """

    rate: float = 3e-3
    epochs: int = 6
    batch_size: int = 128
    weight_decay: float = 1e-4
    optimizer: str = "adamw"
    schedule: str = "onecycle"
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_number("rate", self.rate, minimum=0)
        check_int("epochs", self.epochs, minimum=1)
        check_int("batch_size", self.batch_size, minimum=1)
        check_number("weight_decay", self.weight_decay, minimum=0)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_number("label_smoothing", self.label_smoothing, minimum=0, maximum=1)

    def scaled(self, epochs: int, rate_factor: float) -> Recipe:
        """Return this recipe with other epochs, at a rate that is a multiple of its own."""
        rate = self.rate * check_number("rate_factor", rate_factor, minimum=0)
        return replace(self, epochs=epochs, rate=rate)


@dataclass(frozen=True)
class AttackData:
    """What a thief has beside the stolen model.

    Attributes:
        train: the thief's labelled images, augmented: items ``(x, y)``, ``x`` float32 ``(C, H, W)``
            normalized as the network takes it, ``y`` its class.
        clean: the same images in the same order, not augmented.
        n_classes: number of classes, >= 2.
        input_mean: mean of the normalization in raw ``[0, 1]`` units, one number for each channel.
        input_std: its standard deviation, likewise.
        recipe: how networks of this kind are trained.
        num_workers: worker processes of each loader.
        make_mark: makes a mark of the thief's own, for attacks that embed one; None if they have none.
    """

    train: Dataset[Batch]
    clean: Dataset[Batch]
    n_classes: int
    input_mean: tuple[float, ...]
    input_std: tuple[float, ...]
    recipe: Recipe = field(default_factory=Recipe)
    num_workers: int = 0
    make_mark: MakeMark | None = None

    @classmethod
    def of(
        cls, data: ImageDataModule, recipe: Recipe, *, share: float = THIEF_SHARE, seed: int = THIEF_SEED
    ) -> AttackData:
        """Give the thief a random share of the training images.

        The validation and test images stay the owner's.

        Args:
            data: the data module on which the owner trained.
            recipe: how networks are trained on it.
            share: share of the training images, in (0, 1].
            seed: seed of the choice.

        Raises:
            ValueError: ``share`` leaves no image.
        """
        check_number("share", share, minimum=0, maximum=1)
        source, _ = data.load_train_and_val()
        n = round(share * len(source))
        if n < 1:
            raise ValueError(f"`share` must leave the thief an image of {len(source)}, got {share}.")
        chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:n]
        transform: dict[str, Any] = {"mean": data.mean, "std": data.std}
        return cls(
            source.view(chosen, augment=data.augment, **transform),
            source.view(chosen, **transform),
            data.n_classes,
            data.mean,
            data.std,
            recipe,
            data.num_workers,
        )

    @property
    def n_images(self) -> int:
        """Number of images that the thief has."""
        return len(self.clean)  # type: ignore[arg-type]

    def batches(self, batch_size: int | None = None, *, seed: int) -> DataLoader[Batch]:
        """Return shuffled, augmented batches; each image occurs once an epoch."""
        return self._loader(self.train, batch_size, shuffle=True, seed=seed)

    def in_order(self, batch_size: int = 512) -> DataLoader[Batch]:
        """Return batches in order, not augmented."""
        return self._loader(self.clean, batch_size, shuffle=False)

    def raw(self, inputs: Tensor) -> Tensor:
        """Return normalized inputs ``(n, C, H, W)`` as raw pixels in [0, 1]."""
        return inputs * _per_channel(self.input_std, inputs) + _per_channel(self.input_mean, inputs)

    def normalized(self, pixels: Tensor) -> Tensor:
        """Return raw pixels ``(n, C, H, W)`` as the network takes them."""
        return (pixels - _per_channel(self.input_mean, pixels)) / _per_channel(self.input_std, pixels)

    def relabelled(self, targets: Tensor) -> AttackData:
        """Return the same images with other targets, indices ``(n,)`` or probabilities ``(n, n_classes)``."""
        return replace(self, train=Relabelled(self.train, targets), clean=Relabelled(self.clean, targets))

    def part(self, index: Tensor) -> AttackData:
        """Return the images at these positions ``(m,)``."""
        return replace(self, train=Part(self.train, index), clean=Part(self.clean, index))

    def _loader(
        self, images: Dataset[Batch], batch_size: int | None, *, shuffle: bool, seed: int = 0
    ) -> DataLoader[Batch]:
        size = batch_size or self.recipe.batch_size
        return DataLoader(
            images,
            batch_size=size,
            shuffle=shuffle,
            # Batch normalization cannot train on a single image.
            drop_last=shuffle and self.n_images % size == 1 < self.n_images,
            # Also where nothing is shuffled, or each loop would take a number from the caller's generator.
            generator=torch.Generator().manual_seed(seed),
            num_workers=self.num_workers,
            collate_fn=keep_batch if hasattr(images, "__getitems__") else None,
        )


class Relabelled(Dataset[Batch]):
    """Images with other targets.

    Args:
        images: the images, with labels that are left out.
        targets: class indices ``(n,)`` or probabilities ``(n, n_classes)``, in the same order.
    """

    def __init__(self, images: Dataset[Batch], targets: Tensor) -> None:
        self._images, self._targets = images, targets

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, item: int) -> Batch:
        return self._images[item][0], self._targets[item]

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Return the batch of these images and their targets."""
        return fetch(self._images, items)[0], self._targets[torch.as_tensor(items)]


class Part(Dataset[Batch]):
    """Some of the images.

    Args:
        images: all of them.
        index: positions ``(m,)``.
    """

    def __init__(self, images: Dataset[Batch], index: Tensor) -> None:
        self._images, self._index = images, index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, item: int) -> Batch:
        return self._images[int(self._index[item])]

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Return the batch of these images and their targets."""
        return fetch(self._images, self._index[torch.as_tensor(items)].tolist())


def fetch(images: Dataset[Batch], items: Sequence[int]) -> Batch:
    """Return the images and targets at these positions as one batch."""
    if hasattr(images, "__getitems__"):
        batch: Batch = images.__getitems__(items)
        return batch
    collated: Batch = default_collate([images[item] for item in items])
    return collated


class Attack:
    """A removal attack with its settings: takes a stolen model, returns another one.

    Subclasses are frozen dataclasses whose fields are the settings of one function.

    Attributes:
        function: the attack, which takes model, data, ``observe`` and the settings.
        kind: ``"model"`` if the weights are changed, ``"responses"`` if the thief keeps them and changes what
            goes into or comes out of a prediction API.
    """

    function: ClassVar[Callable[..., nn.Module]]
    kind: ClassVar[Literal["model", "responses"]] = "model"

    def __call__(self, model: nn.Module, data: AttackData, *, observe: Observe | None = None) -> nn.Module:
        """Return an attacked copy of a model, in evaluation mode; the model itself stays as it is.

        Args:
            model: maps normalized inputs ``(n, C, H, W)`` to logits ``(n, n_classes)``.
            data: what the thief has.
            observe: is called with the dose so far (epochs, share of weights, ...) and the model at that
                dose, which it must not change; doses ascend, and each comes once.

        Raises:
            ValueError: a setting is out of range, or the attack does not apply to the model.
        """
        return type(self).function(model, data, observe=observe, **vars(self))


def copied(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters can be trained, in evaluation mode."""
    twin = copy.deepcopy(model).eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    return twin


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter; the CPU if there is none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def last_layer(model: nn.Module) -> nn.Linear:
    """Return the linear layer that a network registers last, which is its head.

    Raises:
        ValueError: there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("`model` must have a linear layer, its head; found none.")
    return layers[-1]


@torch.no_grad()
def predictions(model: nn.Module, data: AttackData) -> Tensor:
    """Return the logits ``(n, n_classes)`` for the thief's images, in order and not augmented, on the CPU."""
    device = device_of(model)
    with frozen_statistics(model):
        return torch.cat([model(x.to(device)).float().cpu() for x, _ in data.in_order()])


@contextmanager
def seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """Draw random numbers from ``seed``, and leave the generators of the caller as they were."""
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def observed(observe: Observe | None, dose: float, model: nn.Module) -> None:
    """Show a model at a dose to whoever wants to see it, in evaluation mode."""
    if observe is None:
        return
    was_training = model.training
    observe(dose, model.eval())
    model.train(was_training)


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
