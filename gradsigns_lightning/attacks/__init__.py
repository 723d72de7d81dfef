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
    from gradsigns_lightning.attacks.chaining import (
        Chain,
        chain,
    )
    from gradsigns_lightning.attacks.cleansing import (
        Laundering,
        TriggerPruning,
        TriggerUnlearning,
        launder,
        prune_trigger,
        unlearn_trigger,
    )
    from gradsigns_lightning.attacks.detection import (
        SuspectRotation,
        rotate_suspect,
        suspect_class,
    )
    from gradsigns_lightning.attacks.ensembles import (
        EnsembleExtraction,
        extract_ensemble,
    )
    from gradsigns_lightning.attacks.extraction import (
        AdversarialExtraction,
        Distillation,
        Retraining,
        distill,
        extract_adversarially,
        retrain,
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
    from gradsigns_lightning.attacks.gradient_masking import (
        DefensiveDistillation,
        Saturation,
        Shattering,
        distill_defensively,
        saturate,
        shatter,
    )
    from gradsigns_lightning.attacks.gradient_penalty import (
        GradientPenalty,
        penalize_gradients,
    )
    from gradsigns_lightning.attacks.inputs import (
        FeatureSqueezing,
        InputFlipping,
        InputNoising,
        InputQuantization,
        InputSmoothing,
        JpegCompression,
        add_input_noise,
        compress_inputs,
        flip_inputs,
        quantize_inputs,
        smooth_inputs,
        squeeze_features,
    )
    from gradsigns_lightning.attacks.layer_rewrites import (
        BatchNormFolding,
        LayerFusion,
        LayerInsertion,
        fold_batch_norm,
        fuse_layers,
        insert_layers,
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
    from gradsigns_lightning.attacks.occlusion import (
        InputOcclusion,
        OcclusionTraining,
        occlude_inputs,
        train_on_occlusions,
    )
    from gradsigns_lightning.attacks.overwriting import (
        Flushing,
        Overwriting,
        flush,
        overwrite,
    )
    from gradsigns_lightning.attacks.own_marks import (
        MakeMark,
        OwnMark,
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
    from gradsigns_lightning.attacks.reconstruction import (
        InputReconstruction,
        reconstruct_inputs,
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
    from gradsigns_lightning.attacks.responses import (
        LabelsOnly,
        RandomizedSmoothing,
        ScoreNoise,
        ScorePerturbation,
        ScoreRounding,
        TopK,
        add_score_noise,
        name_best_classes,
        perturb_scores,
        round_scores,
        smooth_randomly,
        tell_labels_only,
    )
    from gradsigns_lightning.attacks.rewrites import (
        DummyNeurons,
        NeuronPermutation,
        NeuronRescaling,
        add_dummy_neurons,
        permute_neurons,
        rescale_neurons,
    )
    from gradsigns_lightning.attacks.rotation import (
        Rotation,
        rotate,
    )
    from gradsigns_lightning.attacks.round_trips import (
        ExportRoundTrip,
        OnnxRoundTrip,
        TorchScriptRoundTrip,
        export_round_trip,
        onnx_round_trip,
        torchscript_round_trip,
    )
    from gradsigns_lightning.attacks.sharpness import (
        SharpnessAware,
        fine_tune_with_sam,
    )
    from gradsigns_lightning.attacks.transfer import (
        RotationTransfer,
        transfer_to_rotations,
    )
    from gradsigns_lightning.attacks.unlearning import (
        AdversarialUnlearning,
        BoundaryReshaping,
        reshape_boundaries,
        unlearn_adversarially,
    )

__all__ = [
    "AdversarialExtraction",
    "AdversarialNeuronPruning",
    "AdversarialTraining",
    "AdversarialUnlearning",
    "Attack",
    "AttackData",
    "AttentionDistillation",
    "BatchNormFolding",
    "BoundaryReshaping",
    "Chain",
    "ChannelPruning",
    "CheckpointAveraging",
    "DefensiveDistillation",
    "Distillation",
    "DummyNeurons",
    "EnsembleExtraction",
    "ExportRoundTrip",
    "FeatureShift",
    "FeatureSqueezing",
    "FinePruning",
    "FineTuning",
    "Flushing",
    "GradientPenalty",
    "InputFlipping",
    "InputNoising",
    "InputOcclusion",
    "InputQuantization",
    "InputReconstruction",
    "InputSmoothing",
    "Int8",
    "JpegCompression",
    "LabelNoise",
    "LabelSmoothing",
    "LabelsOnly",
    "Laundering",
    "LayerFusion",
    "LayerInsertion",
    "LipschitzPruning",
    "MakeMark",
    "ModeConnectivity",
    "NeuronPermutation",
    "NeuronRescaling",
    "OcclusionTraining",
    "OnnxRoundTrip",
    "Overwriting",
    "OwnMark",
    "Pruning",
    "Quantization",
    "RandomizedSmoothing",
    "Recipe",
    "ReconstructiveNeuronPruning",
    "Refit",
    "Regularization",
    "Retraining",
    "Rotation",
    "RotationTransfer",
    "Saturation",
    "ScoreNoise",
    "ScorePerturbation",
    "ScoreRounding",
    "SharpnessAware",
    "Shattering",
    "SuperFineTuning",
    "SuspectRotation",
    "TopK",
    "TorchScriptRoundTrip",
    "TriggerPruning",
    "TriggerUnlearning",
    "WeightNoise",
    "WeightShifting",
    "add_dummy_neurons",
    "add_input_noise",
    "add_score_noise",
    "add_weight_noise",
    "average_checkpoints",
    "chain",
    "compress_inputs",
    "connect_modes",
    "distill",
    "distill_attention",
    "distill_defensively",
    "export_round_trip",
    "extract_adversarially",
    "extract_ensemble",
    "fine_prune",
    "fine_tune",
    "fine_tune_with_sam",
    "flip_inputs",
    "flush",
    "fold_batch_norm",
    "fuse_layers",
    "insert_layers",
    "launder",
    "name_best_classes",
    "noise_labels",
    "occlude_inputs",
    "onnx_round_trip",
    "overwrite",
    "penalize_gradients",
    "permute_neurons",
    "perturb_scores",
    "prune",
    "prune_adversarially",
    "prune_channels",
    "prune_lipschitz",
    "prune_reconstructively",
    "prune_trigger",
    "quantize",
    "quantize_inputs",
    "quantize_int8",
    "reconstruct_inputs",
    "refit",
    "regularize",
    "rescale_neurons",
    "reshape_boundaries",
    "retrain",
    "rotate",
    "rotate_suspect",
    "round_scores",
    "saturate",
    "shatter",
    "shift_features",
    "shift_weights",
    "smooth_inputs",
    "smooth_labels",
    "smooth_randomly",
    "squeeze_features",
    "super_fine_tune",
    "suspect_class",
    "tell_labels_only",
    "torchscript_round_trip",
    "train_adversarially",
    "train_on_occlusions",
    "transfer_to_rotations",
    "unlearn_adversarially",
    "unlearn_trigger",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "averaging": "CheckpointAveraging ModeConnectivity average_checkpoints connect_modes",
        "base": "Attack AttackData Recipe",
        "chaining": "Chain chain",
        "cleansing": "Laundering TriggerPruning TriggerUnlearning launder prune_trigger unlearn_trigger",
        "detection": "SuspectRotation rotate_suspect suspect_class",
        "ensembles": "EnsembleExtraction extract_ensemble",
        "extraction": "AdversarialExtraction Distillation Retraining distill extract_adversarially retrain",
        "fine_pruning": "FinePruning fine_prune",
        "fine_tuning": "FineTuning LabelNoise LabelSmoothing SuperFineTuning fine_tune noise_labels "
        "smooth_labels super_fine_tune",
        "gradient_masking": "DefensiveDistillation Saturation Shattering distill_defensively saturate "
        "shatter",
        "gradient_penalty": "GradientPenalty penalize_gradients",
        "inputs": "FeatureSqueezing InputFlipping InputNoising InputQuantization InputSmoothing "
        "JpegCompression add_input_noise compress_inputs flip_inputs quantize_inputs "
        "smooth_inputs squeeze_features",
        "layer_rewrites": "BatchNormFolding LayerFusion LayerInsertion fold_batch_norm fuse_layers "
        "insert_layers",
        "lipschitz_pruning": "LipschitzPruning prune_lipschitz",
        "neuron_pruning": "AdversarialNeuronPruning ReconstructiveNeuronPruning prune_adversarially "
        "prune_reconstructively",
        "noise": "WeightNoise WeightShifting add_weight_noise shift_weights",
        "occlusion": "InputOcclusion OcclusionTraining occlude_inputs train_on_occlusions",
        "overwriting": "Flushing Overwriting flush overwrite",
        "own_marks": "MakeMark OwnMark",
        "pruning": "ChannelPruning Pruning prune prune_channels",
        "quantization": "Int8 Quantization quantize quantize_int8",
        "reconstruction": "InputReconstruction reconstruct_inputs",
        "regularization": "FeatureShift Refit Regularization refit regularize shift_features",
        "repair": "AdversarialTraining AttentionDistillation distill_attention train_adversarially",
        "responses": "LabelsOnly RandomizedSmoothing ScoreNoise ScorePerturbation ScoreRounding "
        "TopK add_score_noise name_best_classes perturb_scores round_scores "
        "smooth_randomly tell_labels_only",
        "rewrites": "DummyNeurons NeuronPermutation NeuronRescaling add_dummy_neurons "
        "permute_neurons rescale_neurons",
        "rotation": "Rotation rotate",
        "round_trips": "ExportRoundTrip OnnxRoundTrip TorchScriptRoundTrip export_round_trip "
        "onnx_round_trip torchscript_round_trip",
        "sharpness": "SharpnessAware fine_tune_with_sam",
        "transfer": "RotationTransfer transfer_to_rotations",
        "unlearning": "AdversarialUnlearning BoundaryReshaping reshape_boundaries unlearn_adversarially",
    },
)
