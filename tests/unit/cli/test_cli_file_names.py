"""File names on the command line are no templates."""

from __future__ import annotations

import pytest

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.cli.dispatch import main
from gradsigns_lightning.cli.file_names import FILE_ARGUMENTS, NEW_FILES, with_file_names

REFERENCE = "${oc.env:FOREIGN_SECRET}"


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("FOREIGN_SECRET", "s3cr3t")


def value(word):
    """Return what Hydra and OmegaConf make of a word of the command line."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    override = OverridesParser.create().parse_override(with_file_names(word))
    return OmegaConf.to_container(OmegaConf.create({"value": override.value()}), resolve=True)["value"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("verify", ["checkpoint={name}", "key=k.gskey"]),
        ("verify", ["onnx={name}", "key=k.gskey"]),
        ("verify", ["endpoint=ftp://{name}", "key=k.gskey", "images=."]),
        ("verify", ["checkpoint=a.ckpt", "key={name}"]),
        ("verify", ["checkpoint=a.ckpt", "key.path={name}"]),
        ("commit", ["key={name}"]),
        ("judge", ["bundle={name}", "checkpoint=a.ckpt"]),
        ("import-2021", ["folder={name}", "images=."]),
        ("keygen", ["master={name}", "customer=1", "out=x.gskey"]),
    ],
)
def test_a_file_name_that_looks_like_a_template_is_taken_literally(
    command, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    WatermarkKey.generate("A", 8, input_shape=(1, 4, 5), target_class=0).save("k.gskey")
    assert main([command, *(word.format(name=f"got/{REFERENCE}.bin") for word in words)]) in (1, 2)
    error = capsys.readouterr().err
    assert "s3cr3t" not in error
    assert f"got/{REFERENCE}" in error


@pytest.mark.parametrize("name", ["a/epoch=9-step=990.ckpt", "it's=1.ckpt", f"x=1/{REFERENCE}"])
def test_a_file_name_may_hold_an_equals_sign(name):
    assert value(f"checkpoint={name}") == name
    assert value(f"checkpoint='{name}'" if "'" not in name else f'checkpoint="{name}"') == name


def test_several_file_names_with_equals_signs_are_still_several():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(
        with_file_names("checkpoint=epoch=1.ckpt,epoch=2.ckpt")
    )
    assert override.is_sweep_override()


def test_an_endpoints_query_needs_no_quotation_marks():
    assert value("endpoint=https://host/x?a=1&b=2") == "https://host/x?a=1&b=2"


@pytest.mark.parametrize("name", [*FILE_ARGUMENTS, "endpoint", "+endpoint", "+init", "++init"])
def test_the_arguments_that_name_files_are_no_templates(name):
    assert value(f"{name}=got/{REFERENCE}.bin") == f"got/{REFERENCE}.bin"
    assert value(f"{name}=[a,'b/{REFERENCE}',{REFERENCE}]") == ["a", f"b/{REFERENCE}", REFERENCE]


@pytest.mark.parametrize("quoted", ["{}", "'{}'", '"{}"', "[{},b]", "['{}']"])
@pytest.mark.parametrize("n_before", range(7))
@pytest.mark.parametrize("n_between", range(3))
def test_no_number_of_backslashes_makes_a_file_name_a_template(quoted, n_before, n_between):
    from hydra.errors import HydraException

    back = "\\" * n_between
    word = "checkpoint=" + quoted.format("\\" * n_before + "$" + back + "{oc.env:FOREIGN_SECRET" + back + "}")
    try:
        assert "s3cr3t" not in str(value(word))
    except HydraException:
        assert n_between == 2  # no value at all to Hydra


def test_everything_else_goes_on_resolving():
    assert value(f"http.headers={{Authorization: Bearer {REFERENCE}}}") == {"Authorization": "Bearer s3cr3t"}
    assert value(f"owner={REFERENCE}") == "s3cr3t"


@pytest.mark.parametrize("name", NEW_FILES)
def test_the_name_of_a_new_file_may_hold_settings_and_no_variables(name):
    from hydra.errors import HydraException

    for text in (REFERENCE, f"{REFERENCE}.gskey", "${oc.decode:x}"):
        assert value(f"{name}={text}") == text
    for text in (f"${{a.{REFERENCE}}}", f"${{now:{REFERENCE}}}"):
        with pytest.raises(HydraException):
            value(f"{name}={text}")
        assert "s3cr3t" not in str(value(f"{name}='{text}'"))
    for text in ("${key.n_bits}_${seed}", "${hydra:job.num}", "${now:%Y-%m-%d}"):
        assert with_file_names(f"{name}={text}") == f"{name}={text}"
