"""Removal attacks: what a thief does to a stolen model so that its watermark cannot be read any more.

Each attack is one function and one thin class, whose instances are settings that can be called: a model and
the thief's data in, another model out. Nothing here knows the owner's key, reads a mark or imports a Trainer;
a mark that a thief embeds on their own account is handed to the attack.
"""

from typing import TYPE_CHECKING

from gradsigns_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from gradsigns_lightning.attacks.base import Attack, AttackData, Recipe
    from gradsigns_lightning.attacks.chaining import Chain, chain
    from gradsigns_lightning.attacks.detection import SuspectRotation, rotate_suspect, suspect_class
    from gradsigns_lightning.attacks.fine_tuning import FineTuning, fine_tune
    from gradsigns_lightning.attacks.gradient_masking import (
        DefensiveDistillation,
        Saturation,
        Shattering,
        distill_defensively,
        saturate,
        shatter,
    )
    from gradsigns_lightning.attacks.gradient_penalty import GradientPenalty, penalize_gradients
    from gradsigns_lightning.attacks.overwriting import Flushing, Overwriting, flush, overwrite
    from gradsigns_lightning.attacks.own_marks import MakeMark, OwnMark
    from gradsigns_lightning.attacks.rotation import Rotation, rotate

__all__ = [
    "Attack",
    "AttackData",
    "Chain",
    "DefensiveDistillation",
    "FineTuning",
    "Flushing",
    "GradientPenalty",
    "MakeMark",
    "Overwriting",
    "OwnMark",
    "Recipe",
    "Rotation",
    "Saturation",
    "Shattering",
    "SuspectRotation",
    "chain",
    "distill_defensively",
    "fine_tune",
    "flush",
    "overwrite",
    "penalize_gradients",
    "rotate",
    "rotate_suspect",
    "saturate",
    "shatter",
    "suspect_class",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "base": "Attack AttackData Recipe",
        "chaining": "Chain chain",
        "detection": "SuspectRotation rotate_suspect suspect_class",
        "fine_tuning": "FineTuning fine_tune",
        "gradient_masking": (
            "DefensiveDistillation Saturation Shattering distill_defensively saturate shatter"
        ),
        "gradient_penalty": "GradientPenalty penalize_gradients",
        "overwriting": "Flushing Overwriting flush overwrite",
        "own_marks": "MakeMark OwnMark",
        "rotation": "Rotation rotate",
    },
)
