"""Removal attacks: what a thief does to a stolen model so that its watermark cannot be read any more.

Each attack is one function and one thin class, whose instances are settings that can be called: a model and
the thief's data in, another model out. Nothing here knows the owner's key, reads a mark or imports a Trainer;
a mark that a thief embeds on their own account is handed to the attack.
"""

from typing import TYPE_CHECKING

from gradsigns_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from gradsigns_lightning.attacks.averaging import (
        CheckpointAveraging,
        ModeConnectivity,
        average_checkpoints,
        connect_modes,
    )
    from gradsigns_lightning.attacks.base import Attack, AttackData, Recipe
    from gradsigns_lightning.attacks.fine_pruning import FinePruning, fine_prune
    from gradsigns_lightning.attacks.fine_tuning import FineTuning, fine_tune
    from gradsigns_lightning.attacks.lipschitz_pruning import LipschitzPruning, prune_lipschitz
    from gradsigns_lightning.attacks.neuron_pruning import (
        AdversarialNeuronPruning,
        ReconstructiveNeuronPruning,
        prune_adversarially,
        prune_reconstructively,
    )
    from gradsigns_lightning.attacks.noise import WeightNoise, WeightShifting, add_weight_noise, shift_weights
    from gradsigns_lightning.attacks.pruning import ChannelPruning, Pruning, prune, prune_channels
    from gradsigns_lightning.attacks.quantization import Int8, Quantization, quantize, quantize_int8

__all__ = [
    "AdversarialNeuronPruning",
    "Attack",
    "AttackData",
    "ChannelPruning",
    "CheckpointAveraging",
    "FinePruning",
    "FineTuning",
    "Int8",
    "LipschitzPruning",
    "ModeConnectivity",
    "Pruning",
    "Quantization",
    "Recipe",
    "ReconstructiveNeuronPruning",
    "WeightNoise",
    "WeightShifting",
    "add_weight_noise",
    "average_checkpoints",
    "connect_modes",
    "fine_prune",
    "fine_tune",
    "prune",
    "prune_adversarially",
    "prune_channels",
    "prune_lipschitz",
    "prune_reconstructively",
    "quantize",
    "quantize_int8",
    "shift_weights",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "averaging": "CheckpointAveraging ModeConnectivity average_checkpoints connect_modes",
        "base": "Attack AttackData Recipe",
        "fine_pruning": "FinePruning fine_prune",
        "fine_tuning": "FineTuning fine_tune",
        "lipschitz_pruning": "LipschitzPruning prune_lipschitz",
        "neuron_pruning": "AdversarialNeuronPruning ReconstructiveNeuronPruning "
        "prune_adversarially prune_reconstructively",
        "noise": "WeightNoise WeightShifting add_weight_noise shift_weights",
        "pruning": "ChannelPruning Pruning prune prune_channels",
        "quantization": "Int8 Quantization quantize quantize_int8",
    },
)
