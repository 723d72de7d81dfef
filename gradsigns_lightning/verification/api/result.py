"""The result of a reading through a prediction API, and why it ended, in words."""

from __future__ import annotations

from dataclasses import dataclass

from gradsigns_lightning.core.key.reach import least_bits
from gradsigns_lightning.core.result import ReadingResult, recognised_in_words, why_inconclusive
from gradsigns_lightning.verification.api.hypotheses import Stopped
from gradsigns_lightning.verification.api.settings import Estimator, Kind

_WHY_STOPPED: dict[Stopped, str] = {
    "proven": "the evidence sufficed",
    "futile": "the rest of the budget could no longer suffice",
    "budget": "`max_queries` were spent: more of them may suffice",
    "images": "all images were used up: more of them may suffice",
}


@dataclass(frozen=True)
class ApiVerificationResult(ReadingResult):
    """What a black-box reading found; ``print`` shows it in three lines.

    It has all attributes of :class:`VerificationResult`; those with a different meaning here come first.

    Attributes:
        n_bits: number of signs that were compared: one for each group of the key's bits where
            ``estimator="groups"`` folds them, else one for each bit.
        n_erasures: signs that the answers could not decide.
        p_value: exact probability that an unmarked model matches as well, each sign weighted by how clearly
            it was read (:func:`sign_flip_p_value`), corrected for every look at the scores and every
            alignment.
        margin: the smallest score in favour of the signature, negative if a sign is wrong, in units of the
            scores' root mean square.
        n_queries: number of images that were sent to the model.
        answers: kind of the answers that were read, None if there were none.
        estimator: how probes were chosen.
        alignment: the alignment that fits best.
        step: distance of the last probes from their image, in units of the raw range [0, 1].
        n_images: number of images that were probed around.
        n_looks: number of looks at the scores.
        stopped: why reading ended: ``"proven"``, ``"futile"`` (the rest of the budget could no longer
            suffice), ``"budget"`` or ``"images"`` (all of them used).
    """

    answers: Kind | None
    estimator: Estimator
    alignment: str
    step: float
    n_images: int
    n_looks: int
    stopped: Stopped

    @property
    def reason(self) -> str:
        """Why the verdict is what it is, and why reading stopped, in words."""
        if self.verdict == "inconclusive":
            return why_inconclusive(self.recognised, "the answers to the probes are all alike, or missing")
        if self.verdict == "owned":
            return f"p <= alpha = {self.alpha:g}{self._for_whom}, so reading stopped"
        least = least_bits(alpha=self.alpha)
        if self.n_bits < least:
            return f"p > alpha = {self.alpha:g}, which {self.n_bits} bits can never reach: {least} would do"
        return f"p > alpha = {self.alpha:g}, and reading stopped because {_WHY_STOPPED[self.stopped]}"

    @property
    def _what_was_read(self) -> str:
        queries = f"{self.n_queries} queries, probes around {self.n_images} images"
        return f"{queries}, answers read as {self.answers or 'nothing'}{recognised_in_words(self.recognised)}"
