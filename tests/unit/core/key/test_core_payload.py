"""Payloads that survive bit errors, and the keys of customers and messages."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from gradsigns_lightning import WatermarkKey, customer_key, message_key
from gradsigns_lightning.core.key.payload import (
    PayloadCode,
    _numba_kept_apart,
    blank_message_key,
    check_traceable,
    free_bits,
)

galois = pytest.importorskip("galois")

MASTER = WatermarkKey.generate("Acme", 128, input_shape=(1, 28, 28), target_class=0, secret=bytes(32))
SHORT = WatermarkKey.generate("Acme", 43, input_shape=(1, 28, 28), target_class=0, secret=bytes(32))
OLD = WatermarkKey.from_parts(
    {name: value for name, value in MASTER.to_public_dict().items() if name not in ("version", "purpose")},
    payload=b"",
    secret=bytes(32),
)
NUMBERS = PayloadCode(128, 2)


def as_bits(payload: bytes, n_bits=128):
    bits = np.zeros(n_bits, np.uint8)
    bits[: 8 * len(payload)] = np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little")
    return bits


@pytest.mark.parametrize(
    ("n_bits", "n_bytes"), [(16, 1), (31, 1), (64, 2), (128, 1), (128, 4), (255, 8), (1024, 32), (8192, 256)]
)
def test_the_parameters_are_those_of_a_bch_code(n_bits, n_bytes):
    # galois' own tables, in which the designed distance 2 t + 1 determines the dimension k.
    code = PayloadCode(n_bits, n_bytes)
    n = max(n for n in (2**m - 1 for m in range(4, 14)) if n < 2 * code.length)
    if n <= 1023:
        with _numba_kept_apart():
            k = galois.BCH(n, d=2 * code.n_correctable + 1).k
        assert n - k + 8 * n_bytes == code.length
    assert code.length <= 8 * (n_bits // 8)
    assert code.n_correctable >= 1


def test_published_vector():
    assert NUMBERS.encode(b"ab").hex() == "61628b68e29edcc45ba4bd778b5f0501"


@pytest.mark.parametrize("seed", range(5))
def test_as_many_errors_as_promised_are_mended(seed):
    generator = np.random.default_rng(seed)
    data = generator.bytes(2)
    bits = as_bits(NUMBERS.encode(data))
    bits[generator.choice(NUMBERS.length, NUMBERS.n_correctable, replace=False)] ^= 1
    bits[NUMBERS.length :] ^= 1  # beyond the codeword nothing is read
    assert NUMBERS.decode(bits) == (data, NUMBERS.n_correctable)


def test_far_too_many_errors_are_reported():
    noise = np.random.default_rng(0).integers(0, 2, (5, 128)).astype(np.uint8)
    for bits in noise:
        with pytest.raises(ValueError, match="no codeword within 23 errors"):
            NUMBERS.decode(bits)


@pytest.mark.parametrize(("n_bits", "n_bytes"), [(8, 1), (128, 16), (64, 8)])
def test_what_leaves_no_room_is_refused(n_bits, n_bytes):
    with pytest.raises(ValueError, match=r"`n_bytes`: .* leave no room for error correction"):
        PayloadCode(n_bits, n_bytes)


def test_data_must_have_the_codes_length():
    with pytest.raises(ValueError, match="`data` must have 2 bytes, got 3"):
        NUMBERS.encode(b"abc")


def test_customers_share_all_but_the_signature():
    first, second = customer_key(MASTER, 17), customer_key(MASTER, 9_999)
    assert torch.equal(first.carriers, second.carriers)
    assert torch.equal(first.projection, MASTER.projection)
    assert len({first.commitment, second.commitment, MASTER.commitment}) == 3


def test_signatures_of_copies_have_nothing_in_common():
    """Any combination of customers' signatures is nobody's, not even the master's or a message's."""
    customers = MASTER.customer_signatures(2000)
    assert all(np.array_equal(customers[i], customer_key(MASTER, i).signature) for i in (0, 1, 1234, 1999))
    others = [MASTER.signature, blank_message_key(MASTER).signature, message_key(MASTER, "a").signature]
    sums = [
        customers[i] ^ customers[j] ^ customers[k] for i, j, k in ((1234, 777, 321), (0, 1, 2), (5, 6, 7))
    ]
    for bits in [*(other.numpy() for other in others), *sums]:
        assert 30 < (customers != bits).sum(1).min() < 64  # as far as random bits are
    assert abs(customers.mean() - 0.5) < 0.005


LABELS = ("space", "tag", "mark/customers", "mark/messages", "signature")


def signatures_from(opened: dict):
    """Yield all signatures that can be derived by using parts of an opened key as a secret or as bits."""
    secret, public = bytes.fromhex(opened["secret"]), opened["public"]
    pieces = {secret[i : i + 32] for i in range(len(secret) - 31)}
    pieces.add(bytes(a ^ b for a, b in zip(secret[:32], secret[-32:], strict=True)))
    for label in LABELS:  # also what the format derives from the halves
        for half in (secret[:32], secret[-32:]):
            pieces.add(key_from(half, public)._derivation.mark.bytes(label, 32))
    for piece in pieces:
        key = key_from(piece, public)
        yield from (key._derivation.mark.bits(label, 128) for label in LABELS)
        yield from (as_bits(piece[:16]), as_bits(piece[16:]))
    for half in (secret[:32], secret[-32:]):
        for piece in pieces:
            yield from copies_signatures(half + piece, public)
        master = key_from(half, public)
        yield from (*master.customer_signatures(200), blank_message_key(master).signature.numpy())


def copies_signatures(secret: bytes, public: dict):
    for number in range(20):
        payload = number.to_bytes(2, "little")
        yield WatermarkKey.from_parts(
            {**public, "purpose": "customer"}, payload=payload, secret=secret
        ).signature.numpy()
    yield WatermarkKey.from_parts(
        {**public, "purpose": "message"}, payload=b"", secret=secret
    ).signature.numpy()


def key_from(secret: bytes, public: dict) -> WatermarkKey:
    return WatermarkKey.from_parts({**public, "purpose": "owner"}, payload=b"", secret=secret)


@pytest.mark.parametrize(
    "opened", [customer_key(MASTER, 17), message_key(MASTER, "v2.1")], ids=["customer", "message"]
)
def test_who_opens_a_copys_key_opens_no_other(opened):
    known = opened.reveal()
    assert MASTER.reveal()["secret"] not in str(known)
    followed = np.array(list(signatures_from(known)))
    assert len(followed) > 400
    for customer, signature in enumerate((*MASTER.customer_signatures(200), MASTER.signature.numpy())):
        nearest = (followed != signature).sum(1).min()
        assert nearest == 0 if opened.purpose == "customer" and customer == 17 else nearest > 25, customer


def test_a_copys_signature_depends_on_all_that_is_in_its_key():
    """Two lists of halves must not yield a try per pair, nor may one customer's key pass for another's."""
    key = customer_key(MASTER, 17)
    public, secret, payload = key.to_public_dict(), key._secret.reveal(), key._payload
    for change in (0, 40):  # in the half of the carriers, and in the customer's own
        other = bytes(b ^ (i == change) for i, b in enumerate(secret))
        changed = WatermarkKey.from_parts(public, payload=payload, secret=other)
        assert (changed.signature != key.signature).sum() > 30
    renumbered = WatermarkKey.from_parts(public, payload=(18).to_bytes(2, "little"), secret=secret)
    assert (renumbered.signature != key.signature).sum() > 30
    message = blank_message_key(MASTER)
    other = bytes(b ^ (i == 0) for i, b in enumerate(message._secret.reveal()))
    changed = WatermarkKey.from_parts(message.to_public_dict(), payload=b"", secret=other)
    assert (changed.signature != message.signature).sum() > 30


def test_the_search_for_other_signatures_can_find_them():
    """It finds all of them in a master's key."""
    followed = np.array(list(signatures_from(MASTER.reveal())))
    for signature in (*MASTER.customer_signatures(200), MASTER.signature.numpy()):
        assert (followed != signature).sum(1).min() == 0


def test_no_customer_has_the_masters_or_a_messages_signature():
    assert not torch.equal(customer_key(MASTER, 0).signature, MASTER.signature)
    assert not torch.equal(message_key(MASTER, "").signature, MASTER.signature)
    assert not torch.equal(
        message_key(MASTER, "ab").signature, customer_key(MASTER, int.from_bytes(b"ab", "little")).signature
    )


@pytest.mark.parametrize(
    ("n_bits", "n_customers", "alpha", "needed"),
    [(43, 10_000, 1e-9, 44), (8, 2, 1e-3, 11), (10, 2, 2.0**-10, 12)],
)
def test_keys_too_short_to_trace_are_refused_with_the_length_that_would_do(
    n_bits, n_customers, alpha, needed
):
    with pytest.raises(ValueError, match=f"`master` must have at least {needed} bits .* got {n_bits}"):
        check_traceable(n_bits, n_customers=n_customers, alpha=alpha)
    check_traceable(needed, n_customers=n_customers, alpha=alpha)
    assert n_customers * 2.0**-needed < alpha <= n_customers * 2.0 ** -(needed - 1)


def test_a_message_key_carries_its_text():
    code = PayloadCode(128, 4)
    key = message_key(MASTER, "v2é")
    assert code.decode(key.signature.numpy() ^ blank_message_key(MASTER).signature.numpy()) == (
        "v2é".encode(),
        0,
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: customer_key(MASTER, 65536), r"`customer` must be an integer in \[0, 65535\], got 65536"),
        (lambda: customer_key(customer_key(MASTER, 1), 2), "`master` must be a key without payload"),
        (lambda: customer_key(message_key(MASTER, ""), 2), "`master` must be a key without payload"),
        (lambda: customer_key(SHORT, 2), "`master` must have at least 44 bits"),
        (lambda: customer_key(OLD, 2), "`master` must be a key of version 2 or later, got version 1"),
        (lambda: message_key(OLD, "a"), "`master` must be a key of version 2 or later, got version 1"),
        (lambda: message_key(MASTER, "\ud800"), "`message` must be text that UTF-8 can hold"),
        (
            lambda: message_key(MASTER, "hello"),
            "`message` must be at most 4 bytes of UTF-8 without zeros, got 5",
        ),
        (lambda: message_key(MASTER, "a\0b"), "`message` must be at most 4 bytes of UTF-8 without zeros"),
    ],
)
def test_wrong_customers_and_messages_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_free_bits_count_what_could_be_chosen():
    assert free_bits(MASTER) == 0
    # a free payload: every bit of the signature
    assert free_bits(MASTER.with_payload(bytes(range(16)))) == 128
    assert free_bits(MASTER.with_payload(b"x")) == 8
    # an owner's payload is charged in full, even if it is a codeword
    assert free_bits(MASTER.with_payload(NUMBERS.encode(b"ab"))) == 8 * 16
    # copies' secrets are quick to try; the customer's number gives no choice
    assert free_bits(customer_key(MASTER, 7)) == 17
    assert free_bits(message_key(MASTER, "v2.1")) == 128 + 17  # whether it is a codeword is not checked
    assert free_bits(blank_message_key(MASTER)) == 17
    assert free_bits(blank_message_key(SHORT, b"a")) == 8 + 17
    assert free_bits(OLD.with_payload(bytes(range(4)))) == 32


def test_the_number_of_threads_stays_as_it_was():
    """This runs in a process of its own, because numba sets the threads only once."""
    script = """
import numpy as np, torch
from gradsigns_lightning.core.key.payload import PayloadCode
code = PayloadCode(64, 1)
payload = np.frombuffer(code.encode(b"a"), np.uint8)
assert code.decode(np.unpackbits(payload, bitorder="little")) == (b"a", 0)
print(torch.get_num_threads())
"""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    environment.pop("NUMBA_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.strip() == "1", done.stderr
