"""The owner's key: one secret from which carriers, projection and signature are derived."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.reduction import ForkingPickler
from os import PathLike
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt

from gradsigns_lightning.core.key import file as keyfile
from gradsigns_lightning.core.key.checks import (
    as_floats,
    check_input_shape,
    warn_if_channels_last,
    warn_if_never_held,
)
from gradsigns_lightning.core.key.derivation import SECRET_BYTES, Derivation, Purpose, Secret
from gradsigns_lightning.core.key.parameters import KeyParameters, check_n_bits
from gradsigns_lightning.core.key.public import arguments_of, context_of
from gradsigns_lightning.core.key.reach import warn_if_never_owned
from gradsigns_lightning.core.utils.canonical import canonical_json
from gradsigns_lightning.core.utils.checks import check_choice, check_instance

if TYPE_CHECKING:
    from torch import Tensor

CARRIERS_PER_BIT = 6  # the ratio of the authors' released key (64 bits on 384 carriers)


@dataclass(frozen=True, repr=False)
class WatermarkKey(KeyParameters):
    """A key that signs the input gradients of one class (GradSigns, MLSys 2021, section 3).

    Make one with :meth:`generate`, keep it with :meth:`save`, read it back with :meth:`load`. Carriers,
    projection and signature are derived from the secret and bound to all public parameters, so that nobody
    can choose any of them to fit a model after the fact (in version 1 the normalization was not bound). The
    payload is free but part of the :attr:`commitment`.

    Keys of copies are derived from an owner's key and do not reveal it (:func:`customer_key`,
    :func:`message_key`).

    A key is its owner's secret. It can be sent to the other processes of a training, but not pickled, and so
    not saved by ``torch.save`` or ``save_hyperparameters``; ``repr``, ``vars`` and ``dataclasses.asdict`` do
    not show the secret.

    Attributes:
        owner: the owner's name, as shown in evidence.
        scope: the model or product that the key is for; may be empty.
        n_bits: number of signature bits N.
        n_carriers: number of input coordinates c that carry the signature.
        input_shape: shape ``(C, H, W)`` of one raw input.
        target_class: class T whose input gradients are signed.
        input_mean: mean that the model's preprocessing subtracts from raw images, one value or one per
            channel.
        input_std: standard deviation that the preprocessing divides by, one value or one per channel.
        version: version of the derivation (docs/key-format.md), 1 or 2.
        purpose: ``"owner"``, or for keys of copies ``"customer"`` (:func:`customer_key`) or ``"message"``
            (:func:`message_key`).
    """

    @classmethod
    def generate(
        cls,
        owner: str,
        n_bits: int = 128,
        *,
        input_shape: Sequence[int],
        target_class: int,
        n_carriers: int | None = None,
        payload: bytes | str | None = None,
        input_mean: float | Sequence[float] = 0.0,
        input_std: float | Sequence[float] = 1.0,
        scope: str = "",
        secret: bytes | None = None,
    ) -> WatermarkKey:
        """Make a new key.

        Warns of fewer than 30 bits, which can never be ``owned`` at the default alpha; of hardly more
        carriers than bits, which leave no room for a margin; and of an ``input_shape`` that looks like
        ``(H, W, C)``.

        Args:
            owner: the owner's name, 1 to 256 characters.
            n_bits: signature bits, 8 to 8192; customers' copies need at least 44, a judge who charges for
                2^64 tries at least 94.
            input_shape: shape ``(C, H, W)`` of one raw input.
            target_class: class whose input gradients are signed.
            n_carriers: input coordinates that carry the signature, from ``n_bits`` to ``C * H * W``; by
                default six per bit as in the authors' released key, or all inputs if there are fewer.
            payload: bytes or UTF-8 text of at most ``n_bits // 8`` bytes that the signature carries, masked
                by a keystream; padded with zeros.
            input_mean: mean of the model's own input normalization in raw units, one value or one per
                channel.
            input_std: standard deviation of that normalization, positive, one value or one per channel.
            scope: model or product that the key is bound to, at most 256 characters.
            secret: 32 secret bytes from a cryptographic generator; by default from the system's.

        Raises:
            ValueError: a value is out of range, or there are fewer carriers than bits.
            TypeError: a value has the wrong type.

        Example:
            >>> key = WatermarkKey.generate("Acme Vision", 64, input_shape=(1, 28, 28), target_class=0)
            >>> key.carriers.shape, key.projection.shape, key.signature.shape
            (torch.Size([384]), torch.Size([64, 384]), torch.Size([64]))
        """
        shape = check_input_shape(input_shape)
        check_n_bits(n_bits)
        if n_carriers is None:
            n_carriers = min(CARRIERS_PER_BIT * n_bits, math.prod(shape))
        check_instance("payload", payload, (bytes, str, type(None)))
        check_instance("secret", secret, (bytes, type(None)))
        key = cls(
            owner=owner,
            scope=scope,
            n_bits=n_bits,
            n_carriers=n_carriers,
            input_shape=shape,
            target_class=target_class,
            input_mean=as_floats("input_mean", input_mean),
            input_std=as_floats("input_std", input_std),
            _payload=payload.encode() if isinstance(payload, str) else payload or b"",
            _secret=Secret.of(secrets.token_bytes(SECRET_BYTES) if secret is None else secret),
        )
        warn_if_never_owned(n_bits, stacklevel=2)
        warn_if_never_held(n_bits, n_carriers, shape, stacklevel=2)
        warn_if_channels_last(shape, stacklevel=2)
        return key

    @cached_property
    def carriers(self) -> Tensor:
        """Indices into the raw input flattened as C, H, W, ascending; shape ``(c,)``, int64."""
        return _as_tensor(self._derivation.carriers(math.prod(self.input_shape), self.n_carriers))

    @cached_property
    def projection(self) -> Tensor:
        """Rademacher matrix E of values +1 and -1; shape ``(N, c)``, int8."""
        return _as_tensor(self._derivation.projection(self.n_bits, self.n_carriers))

    @cached_property
    def signature(self) -> Tensor:
        """Bits b that the model is made to show; shape ``(N,)``, uint8, values 0 and 1.

        They are a keystream XOR the payload. A customer's signature is the keystream alone, so that it has
        nothing in common with other customers', the owner's or a message's.
        """
        return _as_tensor(self._derivation.signature(self.n_bits, self._payload))

    def customer_signatures(self, n_customers: int) -> npt.NDArray[np.uint8]:
        """Return the signatures of customers 0 to ``n_customers - 1``.

        Returns:
            Bits, shape ``(n_customers, N)``, values 0 and 1.

        Raises:
            ValueError: no copies' keys can be derived from this key: it is of version 1, or a copy's itself.
        """
        self._check_master()
        return self._derivation.customer_signatures(n_customers, self.n_bits)

    @cached_property
    def commitment(self) -> str:
        """Public commitment: SHA-256 of the canonical key, salted from the secret; 64 hexadecimal digits."""
        secret = {"payload": self._payload.hex(), "secret": self._secret.reveal().hex()}
        return self._derivation.digest("commitment", canonical_json({**self.to_public_dict(), **secret}))

    def claim(self, signer: str) -> str:
        """Return the digest by which a public statement says that ``signer`` may claim this key.

        It has 64 hexadecimal digits, and only whoever has the secret can make it. The :attr:`commitment` does
        not suffice, because others can copy it from checkpoints and logs into statements of their own.

        Args:
            signer: an Ed25519 public key, 64 hexadecimal digits.
        """
        check_instance("signer", signer, str)
        return self._derivation.digest(
            "claim", canonical_json({"commitment": self.commitment, "signer": signer})
        )

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write the key file (safetensors, mode 0600) in one atomic step.

        Raises:
            FileExistsError: the file exists and ``overwrite`` is false.
            FileNotFoundError: its folder does not exist. Both errors are :class:`ValueError` too.
        """
        keyfile.write(
            path,
            secret=self._secret,
            payload=self._payload,
            public=self.to_public_dict(),
            commitment=self.commitment,
            overwrite=overwrite,
        )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> WatermarkKey:
        """Read a key file.

        Raises:
            FileNotFoundError: the file is missing; the error is a :class:`ValueError` too.
            ValueError: the file is truncated, edited, of an unknown version or not a key file.
        """
        content = keyfile.read(path)
        try:
            key = cls.from_parts(content.public, payload=content.payload, secret=content.secret)
        except ValueError as error:
            raise ValueError(
                f"`path`: the parameters in key file {str(path)!r} are not valid; it was edited or damaged."
            ) from error
        if key.commitment != content.commitment:
            raise ValueError(
                f"`path`: key file {str(path)!r} does not match its own commitment; it was edited or damaged."
            )
        return key

    @classmethod
    def from_parts(cls, public: Mapping[str, Any], *, payload: bytes, secret: bytes | Secret) -> WatermarkKey:
        """Return a key from its public parameters, payload and secret, as key files and bundles hold them.

        Raises:
            ValueError: a parameter is missing, unknown or not valid.
        """
        try:
            return cls(**arguments_of(public), _payload=payload, _secret=Secret.of(secret))
        except TypeError as error:
            raise ValueError(f"`public` holds a value of the wrong type: {error}") from error

    def with_payload(self, payload: bytes | str) -> WatermarkKey:
        """Return the key with another payload, and so another signature; the rest stays the same.

        Raises:
            ValueError: the payload is too long, or the key is a copy's.
            TypeError: the payload is neither bytes nor text.
        """
        check_instance("payload", payload, (bytes, str))
        if self.purpose != "owner":
            raise ValueError(
                f"`payload` can be replaced only in owners' keys, got a key of purpose {self.purpose!r}."
            )
        return self._replaced(_payload=payload.encode() if isinstance(payload, str) else payload)

    def derive(self, purpose: Purpose, payload: bytes) -> WatermarkKey:
        """Return the key of a copy, with the same carriers and projection and a signature of its own.

        The derivation is one-way: the copy's key reveals neither the secret nor the signature of this key or
        of any other customer's. Keys of messages share one secret, so that a message can be read without
        knowing it beforehand.

        Args:
            purpose: ``"customer"`` or ``"message"``.
            payload: the customer's number as two bytes, little-endian; or the coded message.

        Raises:
            ValueError: an argument is not valid, or no copies' keys can be derived from this key: it is of
                version 1, or a copy's itself.
            TypeError: the payload is not bytes.
        """
        check_choice("purpose", purpose, get_args(Purpose)[1:])
        check_instance("payload", payload, bytes)
        self._check_master()
        return self._replaced(
            _payload=payload, purpose=purpose, _secret=self._derivation.copys_secret(purpose, payload)
        )

    def __repr__(self) -> str:
        return (
            f"WatermarkKey(owner={self.owner!r}, n_bits={self.n_bits}, n_carriers={self.n_carriers}, "
            f"input_shape={self.input_shape}, target_class={self.target_class}, "
            f"commitment='{self.commitment[:12]}…')"
        )

    def _check_master(self) -> None:
        if self.version < 2 or self.purpose != "owner":
            raise ValueError(
                "Keys of copies can be derived only from an owner's key of version 2 or later, got a key of "
                f"version {self.version} and purpose {self.purpose!r}."
            )

    def _replaced(self, **changes: Any) -> WatermarkKey:
        other = replace(self, **changes)
        derived = {name: value for name, value in vars(self).items() if name in ("carriers", "projection")}
        vars(other).update(derived)
        return other

    @cached_property
    def _derivation(self) -> Derivation:
        context = context_of(self.to_public_dict(), self.version)
        return Derivation.of(self._secret, purpose=self.purpose, context=context, version=self.version)


def _as_tensor(array: npt.NDArray[Any]) -> Tensor:
    """Return an array as a tensor that can be used in training, even if made in inference mode.

    Torch is imported here because that takes two seconds, and no tensor is needed to make a key or a
    commitment.
    """
    import torch

    with torch.inference_mode(False):
        return torch.from_numpy(array)


def _for_another_process(key: WatermarkKey) -> tuple[Callable[..., WatermarkKey], tuple[Any, ...]]:
    return _rebuilt, (key.to_public_dict(), key._payload, key._secret.reveal())


def _rebuilt(public: dict[str, Any], payload: bytes, secret: bytes) -> WatermarkKey:
    return WatermarkKey.from_parts(public, payload=payload, secret=secret)


# To its own child processes a key is sent through a pipe, not a file.
ForkingPickler.register(WatermarkKey, _for_another_process)
