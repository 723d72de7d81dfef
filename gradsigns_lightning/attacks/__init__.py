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
    from gradsigns_lightning.attacks.base import (
        Attack,
        AttackData,
        Recipe,
    )
    from gradsigns_lightning.attacks.cleansing import (
        Laundering,
        TriggerPruning,
        TriggerUnlearning,
        launder,
        prune_trigger,
        unlearn_trigger,
    )
    from gradsigns_lightning.attacks.fine_pruning import (
        FinePruning,
        fine_prune,
    )
    from gradsigns_lightning.attacks.fine_tuning import (
        FineTuning,
        LabelNoise,
        LabelSmoothing,
        SuperFineTuning,
        fine_tune,
        noise_labels,
        smooth_labels,
        super_fine_tune,
    )
    from gradsigns_lightning.attacks.lipschitz_pruning import (
        LipschitzPruning,
        prune_lipschitz,
    )
    from gradsigns_lightning.attacks.neuron_pruning import (
        AdversarialNeuronPruning,
        ReconstructiveNeuronPruning,
        prune_adversarially,
        prune_reconstructively,
    )
    from gradsigns_lightning.attacks.noise import (
        WeightNoise,
        WeightShifting,
        add_weight_noise,
        shift_weights,
    )
    from gradsigns_lightning.attacks.pruning import (
        ChannelPruning,
        Pruning,
        prune,
        prune_channels,
    )
    from gradsigns_lightning.attacks.quantization import (
        Int8,
        Quantization,
        quantize,
        quantize_int8,
    )
    from gradsigns_lightning.attacks.regularization import (
        FeatureShift,
        Refit,
        Regularization,
        refit,
        regularize,
        shift_features,
    )
    from gradsigns_lightning.attacks.repair import (
        AdversarialTraining,
        AttentionDistillation,
        distill_attention,
        train_adversarially,
    )
    from gradsigns_lightning.attacks.sharpness import (
        SharpnessAware,
        fine_tune_with_sam,
    )
    from gradsigns_lightning.attacks.unlearning import (
        AdversarialUnlearning,
        BoundaryReshaping,
        reshape_boundaries,
        unlearn_adversarially,
    )

__all__ = [
    "AdversarialNeuronPruning",
    "AdversarialTraining",
    "AdversarialUnlearning",
    "Attack",
    "AttackData",
    "AttentionDistillation",
    "BoundaryReshaping",
    "ChannelPruning",
    "CheckpointAveraging",
    "FeatureShift",
    "FinePruning",
    "FineTuning",
    "Int8",
    "LabelNoise",
    "LabelSmoothing",
    "Laundering",
    "LipschitzPruning",
    "ModeConnectivity",
    "Pruning",
    "Quantization",
    "Recipe",
    "ReconstructiveNeuronPruning",
    "Refit",
    "Regularization",
    "SharpnessAware",
    "SuperFineTuning",
    "TriggerPruning",
    "TriggerUnlearning",
    "WeightNoise",
    "WeightShifting",
    "add_weight_noise",
    "average_checkpoints",
    "connect_modes",
    "distill_attention",
    "fine_prune",
    "fine_tune",
    "fine_tune_with_sam",
    "launder",
    "noise_labels",
    "prune",
    "prune_adversarially",
    "prune_channels",
    "prune_lipschitz",
    "prune_reconstructively",
    "prune_trigger",
    "quantize",
    "quantize_int8",
    "refit",
    "regularize",
    "reshape_boundaries",
    "shift_features",
    "shift_weights",
    "smooth_labels",
    "super_fine_tune",
    "train_adversarially",
    "unlearn_adversarially",
    "unlearn_trigger",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "averaging": "CheckpointAveraging ModeConnectivity average_checkpoints connect_modes",
        "base": "Attack AttackData Recipe",
        "cleansing": "Laundering TriggerPruning TriggerUnlearning launder prune_trigger unlearn_trigger",
        "fine_pruning": "FinePruning fine_prune",
        "fine_tuning": "FineTuning LabelNoise LabelSmoothing SuperFineTuning fine_tune noise_labels smooth_labels "
        "super_fine_tune",
        "lipschitz_pruning": "LipschitzPruning prune_lipschitz",
        "neuron_pruning": "AdversarialNeuronPruning ReconstructiveNeuronPruning prune_adversarially "
        "prune_reconstructively",
        "noise": "WeightNoise WeightShifting add_weight_noise shift_weights",
        "pruning": "ChannelPruning Pruning prune prune_channels",
        "quantization": "Int8 Quantization quantize quantize_int8",
        "regularization": "FeatureShift Refit Regularization refit regularize shift_features",
        "repair": "AdversarialTraining AttentionDistillation distill_attention train_adversarially",
        "sharpness": "SharpnessAware fine_tune_with_sam",
        "unlearning": "AdversarialUnlearning BoundaryReshaping reshape_boundaries unlearn_adversarially",
    },
)
