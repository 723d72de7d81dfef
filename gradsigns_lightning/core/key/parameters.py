"""The parameters of a key, public and secret, their bounds, and where they may go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn, get_args

from typing_extensions import Self

from gradsigns_lightning.core.key.checks import (
    check_capacity,
    check_input_shape,
    check_name,
    check_statistics,
)
from gradsigns_lightning.core.key.derivation import Purpose, Secret, check_hidden
from gradsigns_lightning.core.key.public import VERSIONS, as_json
from gradsigns_lightning.core.utils.checks import check_choice, check_int

MIN_BITS, MAX_BITS = 8, 8192
VERSION = 2  # of new keys; keys of version 1 can still be read


@dataclass(frozen=True, repr=False)
class KeyParameters:
    """The parameters from which a key derives its parts; see :class:`WatermarkKey`.

    They are immutable, and cannot be pickled, because a pickle would hold the secret.
    """

    owner: str
    scope: str
    n_bits: int
    n_carriers: int
    input_shape: tuple[int, ...]
    target_class: int
    input_mean: tuple[float, ...]
    input_std: tuple[float, ...]
    _payload: bytes = field(repr=False)
    _secret: Secret = field(repr=False)
    version: int = VERSION
    purpose: Purpose = "owner"

    def __post_init__(self) -> None:
        check_choice("version", self.version, VERSIONS)
        check_choice("purpose", self.purpose, get_args(Purpose) if self.version > 1 else ("owner",))
        check_name("owner", self.owner, minimum=1)
        check_name("scope", self.scope, minimum=0)
        check_int("target_class", self.target_class, minimum=0, maximum=2**31 - 1)
        check_input_shape(self.input_shape)
        check_n_bits(self.n_bits)
        check_capacity(self.n_bits, self.n_carriers, self.input_shape)
        for name, values in (("input_mean", self.input_mean), ("input_std", self.input_std)):
            check_statistics(name, values, n_channels=self.input_shape[0])
        check_hidden(self._secret, self._payload, purpose=self.purpose, n_bits=self.n_bits)

    @property
    def has_payload(self) -> bool:
        """Whether the signature carries a payload, or is a copy's."""
        return bool(self._payload) or self.purpose != "owner"

    def to_public_dict(self) -> dict[str, Any]:
        """Return the parameters that are not secret, as plain JSON types."""
        return as_json(self, self.version)

    def reveal(self) -> dict[str, Any]:
        """Return the whole key, including the secret, as plain JSON types; this is what proves a claim."""
        return {
            "public": self.to_public_dict(),
            "payload": self._payload.hex(),
            "secret": self._secret.reveal().hex(),
        }

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # it is immutable

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A WatermarkKey cannot be pickled, because the file would hold its secret (torch.save and "
            "save_hyperparameters pickle too): save it with `key.save(path)`, and leave it out with "
            "`save_hyperparameters(ignore=['key'])`."
        )


def check_n_bits(n_bits: int) -> None:
    """Refuse a number of signature bits that no key may have."""
    check_int("n_bits", n_bits, minimum=MIN_BITS, maximum=MAX_BITS)
