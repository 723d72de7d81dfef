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
    from gradsigns_lightning.attacks.layer_rewrites import (
        BatchNormFolding,
        LayerFusion,
        LayerInsertion,
        fold_batch_norm,
        fuse_layers,
        insert_layers,
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
    "FineTuning",
    "LayerFusion",
    "LayerInsertion",
    "NeuronPermutation",
    "NeuronRescaling",
    "OnnxRoundTrip",
    "Recipe",
    "TorchScriptRoundTrip",
    "add_dummy_neurons",
    "export_round_trip",
    "fine_tune",
    "fold_batch_norm",
    "fuse_layers",
    "insert_layers",
    "onnx_round_trip",
    "permute_neurons",
    "rescale_neurons",
    "torchscript_round_trip",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "base": "Attack AttackData Recipe",
        "fine_tuning": "FineTuning fine_tune",
        "layer_rewrites": "BatchNormFolding LayerFusion LayerInsertion "
        "fold_batch_norm fuse_layers insert_layers",
        "rewrites": "DummyNeurons NeuronPermutation NeuronRescaling "
        "add_dummy_neurons permute_neurons rescale_neurons",
        "round_trips": "ExportRoundTrip OnnxRoundTrip TorchScriptRoundTrip "
        "export_round_trip onnx_round_trip torchscript_round_trip",
    },
)
