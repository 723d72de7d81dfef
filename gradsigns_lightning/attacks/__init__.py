"""Removal attacks: what a thief does to a stolen model so that its watermark cannot be read any more.

Each attack is one function and one thin class, whose instances are settings that can be called: a model and
the thief's data in, another model out. Nothing here knows the owner's key, reads a mark or imports a Trainer;
a mark that a thief embeds on their own account is handed to the attack.
"""

from typing import TYPE_CHECKING

from gradsigns_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from gradsigns_lightning.attacks.base import Attack, AttackData, Recipe
    from gradsigns_lightning.attacks.fine_tuning import FineTuning, fine_tune
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
    from gradsigns_lightning.attacks.occlusion import (
        InputOcclusion,
        OcclusionTraining,
        occlude_inputs,
        train_on_occlusions,
    )
    from gradsigns_lightning.attacks.reconstruction import InputReconstruction, reconstruct_inputs
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
    from gradsigns_lightning.attacks.round_trips import (
        ExportRoundTrip,
        OnnxRoundTrip,
        TorchScriptRoundTrip,
        export_round_trip,
        onnx_round_trip,
        torchscript_round_trip,
    )

__all__ = [
    "Attack",
    "AttackData",
    "BatchNormFolding",
    "DummyNeurons",
    "ExportRoundTrip",
    "FeatureSqueezing",
    "FineTuning",
    "InputFlipping",
    "InputNoising",
    "InputOcclusion",
    "InputQuantization",
    "InputReconstruction",
    "InputSmoothing",
    "JpegCompression",
    "LabelsOnly",
    "LayerFusion",
    "LayerInsertion",
    "NeuronPermutation",
    "NeuronRescaling",
    "OcclusionTraining",
    "OnnxRoundTrip",
    "RandomizedSmoothing",
    "Recipe",
    "ScoreNoise",
    "ScorePerturbation",
    "ScoreRounding",
    "TopK",
    "TorchScriptRoundTrip",
    "add_dummy_neurons",
    "add_input_noise",
    "add_score_noise",
    "compress_inputs",
    "export_round_trip",
    "fine_tune",
    "flip_inputs",
    "fold_batch_norm",
    "fuse_layers",
    "insert_layers",
    "name_best_classes",
    "occlude_inputs",
    "onnx_round_trip",
    "permute_neurons",
    "perturb_scores",
    "quantize_inputs",
    "reconstruct_inputs",
    "rescale_neurons",
    "round_scores",
    "smooth_inputs",
    "smooth_randomly",
    "squeeze_features",
    "tell_labels_only",
    "torchscript_round_trip",
    "train_on_occlusions",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "base": "Attack AttackData Recipe",
        "fine_tuning": "FineTuning fine_tune",
        "inputs": "FeatureSqueezing InputFlipping InputNoising InputQuantization "
        "InputSmoothing JpegCompression add_input_noise compress_inputs "
        "flip_inputs quantize_inputs smooth_inputs squeeze_features",
        "layer_rewrites": "BatchNormFolding LayerFusion LayerInsertion fold_batch_norm "
        "fuse_layers insert_layers",
        "occlusion": "InputOcclusion OcclusionTraining occlude_inputs train_on_occlusions",
        "reconstruction": "InputReconstruction reconstruct_inputs",
        "responses": "LabelsOnly RandomizedSmoothing ScoreNoise ScorePerturbation "
        "ScoreRounding TopK add_score_noise name_best_classes perturb_scores "
        "round_scores smooth_randomly tell_labels_only",
        "rewrites": "DummyNeurons NeuronPermutation NeuronRescaling add_dummy_neurons "
        "permute_neurons rescale_neurons",
        "round_trips": "ExportRoundTrip OnnxRoundTrip TorchScriptRoundTrip export_round_trip "
        "onnx_round_trip torchscript_round_trip",
    },
)
