"""Commitment, evidence bundle and judgement; the published forgeries fail."""

import base64
import inspect
import json
import time
import tracemalloc
import warnings
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsigns_lightning import WatermarkKey, customer_key, verify, verify_api, verify_many
from gradsigns_lightning.cli.tables import verification_rows
from gradsigns_lightning.core.key.payload import blank_message_key, free_bits
from gradsigns_lightning.core.signature import input_gradients
from gradsigns_lightning.core.utils.canonical import canonical_json
from gradsigns_lightning.evidence import (
    Bundle,
    Statement,
    check_timestamp,
    judge,
    load_signer,
    make_statement,
    signer_pem,
    timestamp_request,
)
from gradsigns_lightning.verification.api.queries import read_journal
from gradsigns_lightning.verification.api.responses import ResponseParser
from gradsigns_lightning.verification.api.settings import ApiSettings

SHAPE, T = (3, 16, 16), 2
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
IMAGES = 0.2 + 0.6 * torch.rand(120, *SHAPE, generator=torch.Generator().manual_seed(1))
OWN, JUDGES = IMAGES[:60], IMAGES[60:]
NOW = datetime.now(timezone.utc)


def key_number(i: int, n_bits=128, **options) -> WatermarkKey:
    return WatermarkKey.generate(
        "Acme",
        n_bits,
        input_shape=SHAPE,
        target_class=T,
        n_carriers=700,
        secret=i.to_bytes(32, "big"),
        **options,
    )


KEY = key_number(7)
STATEMENT = make_statement([key_number(1), KEY], SIGNER)


@pytest.fixture(scope="module")
def model(planted):
    return planted(KEY)


@pytest.fixture(scope="module")
def unmarked(planted):
    return planted(key_number(99))


def scores(model):
    return lambda x: model(x).double().softmax(1).detach()


@pytest.fixture(scope="module")
def transcript(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("journal") / "answers.jsonl"
    result = verify_api(scores(model), KEY, OWN, journal=path)
    return result, (OWN * 255).round().to(torch.uint8), read_journal(path)


@pytest.fixture
def bundle_file(tmp_path, transcript):
    path = tmp_path / "acme.gsbundle"
    Bundle(key=KEY, statement=STATEMENT, images=transcript[1], transcript=transcript[2]).save(path, SIGNER)
    return path


def edited(path, change, *, sign_with=None):
    """Change the content of a bundle file; sign it again if a signer is given."""
    content = json.loads(path.read_text())
    change(content["evidence"])
    if sign_with is not None:
        content["signature"] = sign_with.sign(canonical_json(content["evidence"])).hex()
    return canonical_json(content) + b"\n"


# --- commitment


def test_a_statement_reveals_nothing_and_reads_back():
    data = STATEMENT.to_bytes()
    assert Statement.from_bytes(data) == STATEMENT
    assert json.loads(data).keys() == {"format", "commitments", "signer", "reading"}
    assert not any(known in data.decode() for known in (KEY.reveal()["secret"], KEY.commitment))
    # another secret, else alike
    assert not set(make_statement([key_number(8)], SIGNER).commitments) & set(STATEMENT.commitments)


def test_a_statement_takes_keys_and_not_their_public_commitments():
    with pytest.raises(ValueError, match="`keys` must name a readable key file, got"):
        make_statement([KEY.commitment], SIGNER)
    with pytest.raises(
        TypeError,
        match=r"`keys` must be a WatermarkKey or the path of a key file .*, got "
        r"bytes",
    ):
        make_statement([bytes.fromhex(KEY.commitment)], SIGNER)


def test_a_copied_commitment_is_nobodys_claim():
    """Nobody can make a statement of their own from public values, even once the key is opened."""
    thief = Ed25519PrivateKey.generate()
    public = signer_pem(thief), thief.public_key().public_bytes_raw().hex()
    for copied in (STATEMENT.commitments, (KEY.commitment,)):
        statement = Statement(copied, public[1])
        with pytest.raises(ValueError, match="`statement` must commit to the key"):
            Bundle(key=KEY, statement=statement)
    assert STATEMENT.commits_to(KEY)
    assert KEY.claim(public[1]) not in STATEMENT.commitments
    assert KEY.commitment not in STATEMENT.commitments


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-2],
        lambda data: data.replace(b"commitments", b"commitment5"),
        lambda data: data.replace(b",", b", ", 1),
        lambda data: data.replace(b'"format"', b'"extra":1,"format"'),
        lambda data: b"[1]\n",
        lambda data: b"[" * 100_000,
        lambda data: b"\xff\xfe",
    ],
)
def test_other_bytes_are_no_statement(change):
    with pytest.raises(ValueError, match="`commitment`"):
        Statement.from_bytes(change(STATEMENT.to_bytes()))


@pytest.mark.parametrize("values", [(), ("ab",), ("G" * 64,), (1,)])
def test_statements_hold_digests(values):
    with pytest.raises(ValueError, match="`commitments`"):
        Statement(values, "0" * 64)


def test_signing_keys_read_back_and_others_are_refused():
    assert signer_pem(load_signer(signer_pem(SIGNER))) == signer_pem(SIGNER)
    rsa = generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for pem in (b"", b"hello", rsa):
        with pytest.raises(ValueError, match="`signer` must be an Ed25519 private key"):
            load_signer(pem)


def test_a_time_stamp_is_checked(authority, other_authority):
    reply = authority.stamp(timestamp_request(STATEMENT))
    certificates = authority.certificates.read_bytes()
    time = check_timestamp(reply, STATEMENT, certificates)
    assert abs(time - datetime.now(timezone.utc)) < timedelta(minutes=5)
    other = make_statement([KEY], SIGNER)
    refused = [
        (reply, other, certificates),
        (reply, STATEMENT, other_authority.certificates.read_bytes()),
        (reply[:-5], STATEMENT, certificates),
        (b"", STATEMENT, certificates),
        (reply[:300] + bytes([reply[300] ^ 1]) + reply[301:], STATEMENT, certificates),
    ]
    for arguments in refused:
        with pytest.raises(ValueError, match="`timestamp` must be a trusted authority's reply"):
            check_timestamp(*arguments)
    for pem in (b"", b"hello", (authority.folder / "stamping.pem").read_bytes()):
        with pytest.raises(ValueError, match="`authority` must"):
            check_timestamp(reply, STATEMENT, pem)


# --- bundle


def test_a_bundle_reads_back(bundle_file, transcript):
    bundle = Bundle.load(bundle_file)
    assert bundle.key == KEY
    assert (bundle.statement, bundle.transcript) == (STATEMENT, transcript[2])
    assert torch.equal(bundle.images, transcript[1])
    assert bundle.software.startswith("gradsigns-lightning ")


def test_a_bundle_holds_no_array(bundle_file):
    assert json.loads(bundle_file.read_text())["evidence"]["key"].keys() == {"public", "payload", "secret"}


@pytest.mark.parametrize("name", ["carriers", "projection", "signature", "extra"])
@pytest.mark.parametrize("where", ["evidence", "key", "public"])
def test_loose_arrays_are_refused_even_when_signed(bundle_file, name, where):
    def add(evidence):
        place = {"evidence": evidence, "key": evidence["key"], "public": evidence["key"]["public"]}[where]
        place[name] = [1, -1, 1]

    with pytest.raises(ValueError, match="must have the members"):
        Bundle.from_bytes(edited(bundle_file, add, sign_with=SIGNER))


def test_who_reads_the_evidence_cannot_claim_with_it(bundle_file):
    # The secret is open now, but only the statement's signer can sign.
    thief = Ed25519PrivateKey.generate()
    with pytest.raises(ValueError, match="signed by the statement's signer"):
        Bundle.from_bytes(
            edited(bundle_file, lambda evidence: evidence.update(software="x"), sign_with=thief)
        )
    stolen = Bundle.load(bundle_file).key
    with pytest.raises(ValueError, match="`signer` must be the one in the statement"):
        Bundle(key=stolen, statement=STATEMENT).save(bundle_file.with_suffix(".2"), thief)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(format="gradsigns-bundle/9"), "has format 'gradsigns-bundle/9'"),
        (lambda e: e.pop("transcript"), "must have the members"),
        (lambda e: e["key"].update(secret="00" * 32), "`statement` must commit to the key"),
        (lambda e: e["key"].update(payload="ff"), "`statement` must commit to the key"),
        (lambda e: e["key"]["public"].update(owner="Eve"), "`statement` must commit to the key"),
        (lambda e: e["key"]["public"].update(n_bits=10**9), "`n_bits`"),
        (lambda e: e["key"]["public"].update(input_shape=[10**6] * 3), "`input_shape`"),
        (lambda e: e["key"]["public"].update(input_shape="abc"), "wrong type"),
        (lambda e: e["key"].update(public=[]), "must be an object"),
        (lambda e: e["key"].update(secret="zz"), "hexadecimal"),
        (
            lambda e: e["key"].update(secret="00" * 31),
            "`secret` must be 32 bytes, or 64 for a copy's key, got 31 bytes",
        ),
        (
            lambda e: e["key"].update(secret="00" * 64),
            "`secret` of a key of purpose 'owner' must be 32 bytes, got 64",
        ),
        (
            lambda e: e["key"]["public"].update(purpose="message"),
            "`secret` of a key of purpose 'message' must be 64 bytes",
        ),
        (lambda e: e["images"].update(shape=[60, 3, 16]), "images must have a shape"),
        (lambda e: e["images"].update(pixels="AAAA"), "images must have a shape"),
        (lambda e: e["images"].update(pixels="?"), "base64"),
        (lambda e: e["images"].update(shape=[1, 3, 16, 960]), "key's shape"),
        (lambda e: e.update(images=None), "both or not at all"),
        (lambda e: e.update(statement=7), "must be text"),
        (lambda e: e.update(statement="{}"), "`commitment`"),
        (lambda e: e.update(timestamp="%"), "base64"),
    ],
)
def test_edited_bundles_are_refused_even_when_signed(bundle_file, change, message):
    with pytest.raises(ValueError, match=message):
        Bundle.from_bytes(edited(bundle_file, change, sign_with=SIGNER))


def test_unsigned_changes_and_other_files_are_refused(bundle_file, tmp_path):
    data = bundle_file.read_bytes()
    with pytest.raises(ValueError, match="signature does not fit"):
        Bundle.from_bytes(edited(bundle_file, lambda evidence: evidence.update(software="other")))
    for content in (
        data[:-3],
        data.replace(b":", b": ", 1),
        b"",
        b"[]\n",
        b"{}\n",
        b"\x80\x04N.",
        b"[" * 100_000,
    ):
        with pytest.raises(ValueError, match="`bundle`"):
            Bundle.from_bytes(content)
    with pytest.raises(ValueError, match="`bundle` must name a readable file"):
        Bundle.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`bundle` must not name an existing file"):
        Bundle(key=KEY, statement=STATEMENT).save(bundle_file, SIGNER)
    assert bundle_file.read_bytes() == data


SMALL = WatermarkKey.generate("A", 8, input_shape=(1, 4, 5), target_class=1, secret=bytes(32))
SMALL_IMAGES = torch.rand(9, 1, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small_content(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")

    def predict(images):
        mean = images.flatten(1).mean(1)
        return torch.stack([mean, 1 - mean], 1)

    verify_api(predict, SMALL, SMALL_IMAGES, max_queries=40, alpha=0.5, journal=folder / "j")
    bundle = Bundle(
        key=SMALL,
        statement=make_statement([SMALL], SIGNER),
        images=(SMALL_IMAGES * 255).round().to(torch.uint8),
        transcript=read_journal(folder / "j"),
    )
    bundle.save(folder / "b", SIGNER)
    judge(Bundle.load(folder / "b"))
    return (folder / "b").read_bytes()


def places(value):
    """Yield container and index of everything below ``value``."""
    for index in (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    ):
        yield value, index
        yield from places(value[index])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_a_claimant_signs_the_error_is_clear(small_content, data):
    content = json.loads(small_content)
    for _ in range(data.draw(st.integers(1, 2))):
        container, index = data.draw(st.sampled_from(list(places(content["evidence"]))))
        container[index] = data.draw(JSON)
    content["signature"] = SIGNER.sign(canonical_json(content["evidence"])).hex()
    try:
        judge(Bundle.from_bytes(canonical_json(content) + b"\n"))
    except ValueError as error:
        assert str(error)  # noqa: PT017


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_whatever_a_file_holds_the_error_is_clear(data):
    for read in (Bundle.from_bytes, Statement.from_bytes):
        with pytest.raises(ValueError, match=r"`bundle`|`commitment`"):
            read(data)


@pytest.mark.parametrize(
    "data", [b"[" + b"{}," * (1 << 23) + b"{}]\n", b"[" * (1 << 24), b"9" * ((1 << 27) + 1)]
)
def test_a_small_file_does_not_take_a_hundred_times_its_size(data):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"must have at most \d+ (bytes|values), got \d+"):
            Bundle.from_bytes(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"n_bits": 8192, "n_carriers": 65537, "input_shape": (1, 512, 512)},
            "`n_bits` \\* `n_carriers` must be <= 536870912",
        ),
        (
            {"n_bits": 8, "n_carriers": 8, "input_shape": (1, 8192, 4097)},
            "`input_shape` must have at most 33554432 coordinates",
        ),
    ],
)
def test_keys_that_ask_for_gigabytes_are_refused_before_anything_is_derived(change, message):
    public = {**KEY.to_public_dict(), **change}
    with pytest.raises(ValueError, match=message):
        WatermarkKey.from_parts(public, payload=b"", secret=bytes(32))


@pytest.mark.parametrize(
    ("n_bits", "side", "estimator"),
    [(4096, 512, "rows"), (4096, 512, "coordinate"), (8, 2900, "coordinate"), (8, 2900, "groups")],
)
def test_directions_that_ask_for_gigabytes_are_refused(model, n_bits, side, estimator):
    key = WatermarkKey.generate(
        "A", n_bits, input_shape=(1, side, side), target_class=0, n_carriers=4096, secret=bytes(32)
    )
    with pytest.raises(ValueError, match="`key` must have at most 268435456 values in all directions"):
        verify_api(model, key, torch.zeros(1, 1, side, side), estimator=estimator)


def test_a_strangers_message_key_costs_a_judge_no_minutes():
    key = blank_message_key(
        WatermarkKey.generate("A", 8192, input_shape=(1, 96, 96), target_class=0, secret=bytes(32)),
        bytes(1024),
    )
    start = time.monotonic()
    assert free_bits(key) == 8192 + 17
    assert time.monotonic() - start < 5


# --- judgement


@pytest.fixture(scope="module")
def dated(authority):
    """What a judge knows if the commitments were stamped before the suspect existed."""
    return {"authority": authority.certificates.read_bytes(), "suspect_since": NOW + timedelta(days=1)}


def stamped(authority, key, statement=None, **content):
    statement = statement or make_statement([key], SIGNER)
    return Bundle(
        key=key, statement=statement, timestamp=authority.stamp(timestamp_request(statement)), **content
    )


@pytest.fixture(scope="module")
def genuine(authority, transcript):
    return stamped(authority, KEY, STATEMENT, images=transcript[1], transcript=transcript[2])


def test_a_genuine_claim_stands(genuine, dated, model, unmarked, transcript):
    judgement = judge(genuine, suspect=model, images=JUDGES, controls={"other": unmarked}, **dated)
    assert (judgement.verdict, judgement.objections, judgement.owner) == ("owned", (), "Acme")
    assert (judgement.remarks, judgement.signer) == ((), STATEMENT.signer)
    assert judgement.to_dict()["transcript"]["verdict"] == "claimed"
    assert judgement.reading.n_matches > 120
    assert judgement.transcript == transcript[0]
    assert judgement.controls["other"].p_value > 1e-3
    assert judgement.log10_adjusted_p_value == pytest.approx(judgement.log10_p_value + 64 * np.log10(2))
    assert json.dumps(judgement.to_dict(), allow_nan=False)


def test_without_an_earlier_time_stamp_nothing_is_owned(genuine, bundle_file, dated, model):
    for bundle, known in [
        (genuine, {}),
        (genuine, {"authority": dated["authority"]}),
        (genuine, {"suspect_since": dated["suspect_since"]}),
        (Bundle.load(bundle_file), dated),  # without stamp
    ]:
        judgement = judge(bundle, suspect=model, images=JUDGES, **known)
        assert judgement.adjusted_p_value < 1e-15
        assert judgement.verdict == "not_proven"
        assert "time-stamp" in judgement.objections[0] or "older than the suspect" in judgement.objections[0]


def test_a_suspect_behind_an_api_is_asked_until_the_adjusted_evidence_suffices(genuine, dated, model):
    judgement = judge(genuine, suspect=scores(model), images=JUDGES, **dated)
    assert judgement.verdict == "owned"
    assert judgement.adjusted_p_value <= 1e-9
    assert judgement.reading.n_queries > 100


def test_without_suspect_there_is_a_claim_and_no_verdict(genuine, dated, transcript):
    for known in ({}, dated):
        judgement = judge(genuine, grinding_bits=0, **known)
        assert (judgement.verdict, judgement.reading) == ("claimed", None)
        assert judgement.p_value == transcript[0].p_value
        assert judgement.adjusted_p_value == pytest.approx(2 * transcript[0].p_value)  # two commitments
        assert "what the claimant says" in judgement.remarks[0]


def test_an_invented_transcript_is_a_claim(tmp_path, authority, dated):
    """Invented answers replay as well as genuine ones."""
    weights = torch.zeros(768)
    weights[KEY.carriers] = (2 * KEY.signature.float() - 1) @ KEY.projection.float()

    def liar(images):
        score = -(images.flatten(1) - 0.5) @ weights / 20
        return torch.stack([score, -score, 0 * score], 1).roll(T, 1)

    result = verify_api(liar, KEY, IMAGES, journal=tmp_path / "j", alpha=1e-30, max_queries=3000)
    assert result.p_value < 1e-25
    content = {"images": (IMAGES * 255).round().to(torch.uint8), "transcript": read_journal(tmp_path / "j")}
    assert judge(stamped(authority, KEY, **content), **dated).verdict == "claimed"


def test_as_many_keys_were_tried_as_were_committed_to(authority, dated, model):
    statement = Statement(
        (*make_statement([KEY], SIGNER).commitments, *(f"{i:064x}" for i in range(1023))), STATEMENT.signer
    )
    judgement = judge(
        stamped(authority, KEY, statement), suspect=model, images=JUDGES, grinding_bits=0, **dated
    )
    assert (judgement.grinding_bits, judgement.n_commitments) == (10.0, 1024)
    assert judgement.log10_adjusted_p_value == pytest.approx(judgement.log10_p_value + 10 * np.log10(2))


def test_a_transcript_read_otherwise_than_announced_is_remarked(authority, model, tmp_path):
    """Whoever picks budget and level after seeing the answers picks where the reading ends."""
    verify_api(scores(model), KEY, OWN, max_queries=70, journal=tmp_path / "short")
    content = {"images": (OWN * 255).round().to(torch.uint8), "transcript": read_journal(tmp_path / "short")}
    announced = make_statement([KEY], SIGNER, reading=ApiSettings(max_queries=70))
    for statement, expected in [(None, 2), (announced, 1)]:
        judgement = judge(stamped(authority, KEY, statement, **content))
        assert len(judgement.remarks) == expected
    assert (
        "not read as the published commitment announced"
        in judge(stamped(authority, KEY, **content)).remarks[1]
    )


def test_the_claimants_normalisation_plays_no_part(authority, dated, planted):
    key = key_number(7, input_mean=0.5, input_std=0.25)
    model = planted(key)  # takes raw images
    judgement = judge(stamped(authority, key), suspect=model, images=JUDGES, **dated)
    assert judgement.verdict == "owned"

    class Normalized(torch.nn.Module):
        def forward(self, x):
            return model(x * 0.25 + 0.5)

    stated = judge(
        stamped(authority, key), suspect=Normalized(), images=JUDGES, input_mean=0.5, input_std=0.25, **dated
    )
    assert stated.verdict == "owned"
    assert stated.reading.margin == pytest.approx(judgement.reading.margin, rel=1e-3)


def test_a_normalisation_solved_for_after_seeing_the_model_is_another_key(unmarked):
    """In version 1, `input_std` changed nothing that was derived, so a claimant could fit the signs by it."""
    tried = [key_number(7, input_std=[1.0, 1.0, std]) for std in (0.5, 0.500001, 2.0)]
    assert len({key.signature.numpy().tobytes() for key in tried}) == 3
    assert len({key.projection.numpy().tobytes() for key in tried}) == 3
    assert all(verify(unmarked, key, OWN).p_value > 1e-3 for key in tried)


def test_images_that_the_claimant_crafted_play_no_part(authority, genuine, dated, model, unmarked):
    own = judge(stamped(authority, KEY, STATEMENT), suspect=unmarked, images=JUDGES, **dated)
    assert judge(genuine, suspect=unmarked, images=JUDGES, **dated).reading == own.reading
    assert own.verdict == "not_proven"


def test_a_judge_has_no_argument_of_the_claimants(authority, dated, model, tmp_path):
    judges = {
        "suspect",
        "images",
        "input_mean",
        "input_std",
        "controls",
        "authority",
        "suspect_since",
        "grinding_bits",
        "alpha",
    }
    assert inspect.signature(judge).parameters.keys() == {"bundle", *judges, "max_queries"}
    assert inspect.signature(Bundle).parameters.keys() == {
        "key",
        "statement",
        "timestamp",
        "images",
        "transcript",
        "software",
    }
    settings = {"estimator": "rows", "alignments": ("identity", "hflip"), "max_queries": 333, "alpha": 1e-5}
    verify_api(scores(model), KEY, OWN, journal=tmp_path / "j", **settings)
    statement = make_statement([KEY], SIGNER, reading=ApiSettings(**settings))
    content = {"images": (OWN * 255).round().to(torch.uint8), "transcript": read_journal(tmp_path / "j")}
    reading = judge(
        stamped(authority, KEY, statement, **content), suspect=scores(model), images=JUDGES, **dated
    ).reading
    assert (reading.estimator, reading.alignment) == ("groups", "identity")
    assert reading.alpha < 1e-20


def test_a_suspect_that_does_not_take_the_images_for_the_class_is_inconclusive(genuine, dated, model):
    class Turned(torch.nn.Module):
        def forward(self, x):
            return model(x) - 100 * torch.nn.functional.one_hot(torch.tensor(T), 3)

    for suspect in (Turned(), scores(Turned())):
        judgement = judge(genuine, suspect=suspect, images=JUDGES, **dated)
        assert (judgement.verdict, judgement.reading.recognised) == ("inconclusive", 0.0)
        assert "does not classify the images as the key's class" in judgement.remarks[-1]


def test_another_model_is_not_proven(bundle_file, unmarked):
    for suspect in (unmarked, scores(unmarked)):
        judgement = judge(Bundle.load(bundle_file), suspect=suspect, images=JUDGES)
        assert (judgement.verdict, judgement.adjusted_p_value) == ("not_proven", 1.0)


@pytest.mark.filterwarnings("ignore:The model takes")
def test_a_suspect_that_shows_nothing_is_inconclusive(bundle_file):
    class Flat(torch.nn.Module):
        def forward(self, x):
            return 0 * x.flatten(1)[:, :3]

    judgement = judge(Bundle.load(bundle_file), suspect=Flat(), images=JUDGES, controls={"flat": Flat()})
    assert judgement.verdict == "inconclusive"
    assert len(judgement.objections) == 1  # of the date alone
    assert judgement.to_dict()["adjusted_p_value"] is None


def test_a_mark_that_controls_show_too_is_no_proof(genuine, dated, model, planted):
    judgement = judge(
        genuine, suspect=model, images=JUDGES, controls={"copy": planted(KEY, noise=0.4)}, **dated
    )
    assert judgement.verdict == "not_proven"
    assert "control model 'copy' shows the signature too" in judgement.objections[0]


def test_edited_answers_do_not_replay(bundle_file, transcript):
    _, images, lines = transcript

    def bundle(changed):
        return Bundle(key=KEY, statement=STATEMENT, images=images, transcript=changed)

    better = json.loads(json.dumps(lines))
    better[0]["alpha"] = 1e-5
    for changed, message in [
        (lines[:-1], "ends before the reading does"),
        ([*lines, lines[-1]], "goes on for 1 answers"),
        ([lines[0], *reversed(lines[1:])], "does not fit this reading"),
        ([{**lines[0], "commitment": "0" * 64}, *lines[1:]], "another key, images or settings"),
        (better, "does not fit this reading|goes on for|ends before"),
        ([], "must be the lines of a journal"),
        ([7], "must be the lines of a journal"),
        (lines[0], "must be the lines of a journal|must be"),
        ([{**lines[0], "batch_size": 0}], "`batch_size`"),
        ([{**lines[0], "estimator": ["rows"]}], "must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            judge(bundle(changed))
    other = Bundle(key=KEY, statement=STATEMENT, images=images.flip(0), transcript=lines)
    with pytest.raises(ValueError, match="another key, images or settings"):
        judge(other)


@pytest.mark.parametrize(
    "error", [KeyError(), IndexError(), TypeError(), MemoryError(), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize(
    "fault", [(ApiSettings, "from_dict"), (ResponseParser, "log_odds")], ids=["settings", "answers"]
)
def test_a_fault_of_ours_is_not_told_as_a_damaged_transcript(bundle_file, monkeypatch, fault, error):
    def fail(*_):
        raise error

    bundle = Bundle.load(bundle_file)
    monkeypatch.setattr(*fault, fail)
    with pytest.raises(type(error)) as caught:
        judge(bundle)
    assert caught.value is error


def test_dates_decide_who_was_first(authority, other_authority, model):
    reply = authority.stamp(timestamp_request(STATEMENT))
    bundle = Bundle(key=KEY, statement=STATEMENT, timestamp=reply)
    trusted = {"suspect": model, "images": JUDGES, "authority": authority.certificates.read_bytes()}
    before = judge(bundle, **trusted, suspect_since=NOW + timedelta(days=1))
    assert (before.verdict, before.precedes_suspect) == ("owned", True)
    assert before.committed_at is not None
    later = judge(bundle, **trusted, suspect_since=NOW - timedelta(days=1))
    assert (later.verdict, later.precedes_suspect) == ("not_proven", False)
    assert "older than the suspect" in later.objections[0]
    undated = judge(Bundle(key=KEY, statement=STATEMENT), **trusted, suspect_since=NOW)
    assert (undated.verdict, undated.committed_at) == ("not_proven", None)
    assert judge(bundle, suspect=model, images=JUDGES).committed_at is None  # no authority, no date
    with pytest.raises(ValueError, match="trusted authority"):
        judge(bundle, **{**trusted, "authority": other_authority.certificates.read_bytes()})
    with pytest.raises(ValueError, match="`suspect_since` must have a time zone"):
        judge(bundle, **trusted, suspect_since=datetime(2026, 1, 1))


def gradient_of(model):
    return input_gradients(model, OWN, T).mean(0).flatten().double()


def test_forgery_by_a_projection_chosen_after_seeing_the_model(unmarked, bundle_file):
    # Published forgery 1: flip every row of the projection that disagrees. With loose arrays the bit error
    # rate is 0 ...
    gradient = gradient_of(unmarked)[KEY.carriers]
    projection, signs = KEY.projection.double(), 2 * KEY.signature.double() - 1
    forged = projection * (signs * torch.sign(projection @ gradient))[:, None]
    assert ((forged @ gradient > 0) == (signs > 0)).all()

    # ... but a bundle takes no arrays, and what follows from the secret does not fit.
    def smuggle(evidence):
        evidence["key"]["projection"] = base64.b64encode(forged.to(torch.int8).numpy().tobytes()).decode()

    with pytest.raises(ValueError, match="no other"):
        Bundle.from_bytes(edited(bundle_file, smuggle, sign_with=SIGNER))
    assert (
        judge(Bundle(key=KEY, statement=STATEMENT), suspect=unmarked, images=JUDGES).verdict == "not_proven"
    )


def test_forgery_by_a_signature_chosen_after_seeing_the_model(unmarked):
    # Published forgery 2: let the signature be what the model shows. Only the payload can be chosen, so the
    # forger chooses all of it.
    gradient = gradient_of(unmarked)[KEY.carriers]
    shown = (KEY.projection.double() @ gradient > 0).numpy().astype(np.uint8)
    forged = KEY.with_payload(np.packbits(shown ^ KEY.signature.numpy(), bitorder="little").tobytes())
    # the raw p-value is worthless for a key made afterwards
    assert verify(unmarked, forged, OWN).p_value < 1e-30
    bundle = Bundle(key=forged, statement=make_statement([forged], SIGNER))
    judgement = judge(bundle, suspect=unmarked, images=JUDGES, grinding_bits=0)
    assert (judgement.verdict, judgement.payload_bits, judgement.adjusted_p_value) == ("not_proven", 128, 1.0)


def test_a_payload_fitted_afterwards_is_said_to_prove_nothing(unmarked):
    gradient = gradient_of(unmarked)[KEY.carriers]
    shown = (KEY.projection.double() @ gradient > 0).numpy().astype(np.uint8)
    forged = KEY.with_payload(np.packbits(shown ^ KEY.signature.numpy(), bitorder="little").tobytes())
    readings = [
        verify(unmarked, forged, OWN),
        verify(unmarked, forged, OWN, input_mean=0.0, input_std=1.0),
        verify_many(unmarked, [forged], OWN)[0],
        verify_api(unmarked, forged, OWN),
    ]
    for result in readings:
        assert (result.free_bits, result.to_dict()["free_bits"]) == (128, 128)
        assert result.log10_charged_p_value == pytest.approx(min(0, result.log10_p_value + 128 * np.log10(2)))
        assert result.log10_charged_p_value > np.log10(result.alpha)
        assert "128 bits were up to whoever made the key" in verification_rows(result)["free choice"]
        assert "(not proven)" in verification_rows(result)["free choice"]
    own = verify(unmarked, KEY, OWN)
    assert (own.free_bits, own.log10_charged_p_value) == (0, own.log10_p_value)
    assert "free choice" not in verification_rows(own)


def test_a_copys_key_costs_little(authority, dated, planted):
    key = customer_key(KEY, 123)
    judgement = judge(stamped(authority, key), suspect=planted(key), images=JUDGES, **dated)
    assert (judgement.verdict, judgement.payload_bits) == ("owned", 17)


def test_a_payload_fitted_to_another_model_before_the_suspect_existed_is_charged(authority, dated, planted):
    """Models of one task share much of their mean gradient, so an early time-stamp excuses no payload."""
    key = KEY.with_payload(bytes(range(16)))
    judgement = judge(stamped(authority, key), suspect=planted(key), images=JUDGES, grinding_bits=0, **dated)
    assert (judgement.precedes_suspect, judgement.payload_bits, judgement.verdict) == (
        True,
        128,
        "not_proven",
    )
    assert judgement.log10_adjusted_p_value == pytest.approx(
        min(0, judgement.log10_p_value + 128 * np.log10(2))
    )


def test_the_judge_warns_of_few_images_only_where_the_mark_was_not_found(genuine, dated, model, unmarked):
    controls = {"other": unmarked, "one more": scores(unmarked)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            judge(genuine, suspect=model, images=JUDGES[:20], controls=controls, **dated).verdict == "owned"
        )
    with pytest.warns(UserWarning, match="Only 20 images"):
        judge(genuine, suspect=unmarked, images=JUDGES[:20], **dated)
    with pytest.warns(UserWarning, match="Only 20 images"):
        judge(genuine, images=JUDGES[:20], controls=controls, **dated)


def test_few_images_hide_no_other_warning_of_a_control(genuine, dated, model, unmarked):
    controls = {"other class": lambda x: scores(unmarked)(x)[:, [2, 1, 0]]}
    with pytest.warns(UserWarning, match="The model classifies only") as caught:
        assert (
            judge(genuine, suspect=model, images=JUDGES[:20], controls=controls, **dated).verdict == "owned"
        )
    assert not any("Only 20 images" in str(warning.message) for warning in caught)


def test_a_judges_reading_pays_for_the_payload_once(planted):
    """The level pays for it; its p-value is not adjusted, nor a control's, which counts against the claim."""
    key = KEY.with_payload(b"x")
    bundle = Bundle(key=key, statement=make_statement([key], SIGNER))
    model = planted(key)
    judgement = judge(
        bundle, suspect=model, images=JUDGES, controls={"same": model}, grinding_bits=3, alpha=1e-5
    )
    reading, control = judgement.reading, judgement.controls["same"]
    assert reading.alpha == pytest.approx(1e-5 * 2.0 ** -(3 + 8))
    assert np.isnan(reading.free_bits)
    assert (judgement.p_value, control.p_value) == (reading.p_value, reading.p_value)
    assert judgement.log10_adjusted_p_value == pytest.approx(reading.log10_p_value + 11 * np.log10(2))
    assert any(
        "control model 'same' shows the signature too" in objection for objection in judgement.objections
    )


def test_of_two_marks_in_one_model_both_are_found_and_the_dates_tell_which_was_first(authority, planted):
    thief, key = Ed25519PrivateKey.generate(), key_number(11)
    first, second = planted(KEY), planted(key)

    class SignedTwice(torch.nn.Module):
        def forward(self, x):
            return first(x) + second(x)

    pem = authority.certificates.read_bytes()

    def judged(key, signer, since):
        statement = make_statement([key], signer)
        bundle = Bundle(key=key, statement=statement, timestamp=authority.stamp(timestamp_request(statement)))
        known = {"authority": pem, "suspect_since": since, "grinding_bits": 0}
        return judge(bundle, suspect=SignedTwice(), images=JUDGES, **known)

    owners = judged(KEY, SIGNER, NOW + timedelta(days=1))
    time.sleep(1.1)  # a stamp tells seconds
    thiefs = judged(key, thief, NOW + timedelta(days=1))
    assert (owners.verdict, thiefs.verdict) == ("owned", "owned")
    assert owners.committed_at < thiefs.committed_at
    assert judged(key, thief, thiefs.committed_at).verdict == "not_proven"


def test_a_control_that_says_nothing_is_said_to_be_none(genuine, dated, model, unmarked):
    class Flat(torch.nn.Module):
        def forward(self, x):
            return 0 * x.flatten(1)[:, :3]

    alone = judge(genuine, suspect=model, images=JUDGES, **dated).remarks
    assert "no control model of the same task was read" in alone[0]
    flat = judge(genuine, suspect=model, images=JUDGES, controls={"flat": Flat()}, **dated).remarks
    assert "control model 'flat' gives no usable answers" in flat[0]
    assert "no control model of the same task was read" in flat[1]
    both = judge(
        genuine, suspect=model, images=JUDGES, controls={"flat": Flat(), "other": unmarked}, **dated
    ).remarks
    assert len(both) == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bundle": 7}, TypeError, "`bundle` must be Bundle"),
        ({"grinding_bits": -1}, ValueError, "`grinding_bits`"),
        ({"alpha": 0}, ValueError, "`alpha`"),
        ({"images": None}, ValueError, "`images` must be given"),
        ({"suspect": None}, ValueError, "`suspect` must be given"),
        ({"suspect_since": "today"}, TypeError, "`suspect_since`"),
    ],
)
def test_bad_arguments_are_named(model, changes, error, message):
    arguments = {
        "bundle": Bundle(key=KEY, statement=STATEMENT),
        "suspect": model,
        "images": JUDGES,
        **changes,
    }
    with pytest.raises(error, match=message):
        judge(**arguments)
