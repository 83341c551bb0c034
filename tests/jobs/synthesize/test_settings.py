"""Precedence and provenance of job settings, their error messages, and the refusal of credentials."""

import os
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from higgs_model.errors import BadInput
from jobs.synthesize.cli import main
from jobs.synthesize.settings import JobSettings, describe_sources, resolve_settings

PRECEDENCE = ("default", "file", "environment", "flags")


def environment(**variables):
    """Set HIGGS_… variables inside a `with` block."""
    return mock.patch.dict(os.environ, {f"HIGGS_{name.upper()}": value for name, value in variables.items()})


@given(st.dictionaries(st.sampled_from(PRECEDENCE[1:]), st.integers(1, 99)))
def test_flags_override_environment_overrides_file_overrides_defaults(tmp_path_factory, values):
    file = tmp_path_factory.mktemp("settings") / "job.yaml"
    file.write_text("manifest: m.jsonl\n" + (f"max-batch: {values['file']}\n" if "file" in values else ""))
    flags = ["--max-batch", str(values["flags"])] if "flags" in values else []
    with environment(**({"max_batch": str(values["environment"])} if "environment" in values else {})):
        settings, sources = resolve_settings(["--config", str(file), *flags])
    winner = max(values, key=PRECEDENCE.index, default="default")
    assert settings.max_batch == values.get(winner)
    assert sources.get("max_batch") == {"default": None, "file": str(file)}.get(winner, winner)
    line = describe_sources(settings, sources)
    assert ("max_batch" in line) == (winner != "default")
    assert "manifest=" in line
    assert "\n" not in line


def test_every_kind_of_setting_can_come_from_the_environment():
    values = {"voice_in_system": "true", "check": "json:loads", "max_failed": "3", "format": "flac", "seed": "7"}
    with environment(**values):
        settings, sources = resolve_settings(["--manifest", "m"])
    assert {name: str(getattr(settings, name)).lower() for name in values} == values
    assert {name: sources[name] for name in values} == dict.fromkeys(values, "environment")


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        (["--voice-in-system", "--no-overwrite"], {"voice_in_system": True, "overwrite": False}),
        (["--max-batch", "3", "--max-batch", "4"], {"max_batch": 4}),
        (["--check", '["a", "b"]', "--codec", "a,b"], {"check": '["a", "b"]', "codec": "a,b"}),
        (["--max-failed=0.5%", "--top-p=0.9"], {"max_failed": "0.5%", "top_p": 0.9}),
    ],
)
def test_flags_are_taken_literally(flags, values):
    settings, _ = resolve_settings(["--manifest", "m", *flags])
    assert {name: getattr(settings, name) for name in values} == values


@pytest.mark.parametrize(("text", "allowed"), [("10", 10), ("0.5%", 5), ("0.25", 250), ("0", 0)])
def test_max_failed_is_a_count_or_a_share(tmp_path, text, allowed):
    (tmp_path / "job.yaml").write_text(f"manifest: m\nmax_failed: {text}\n")
    for arguments in (["--manifest", "m", "--max-failed", text], ["--config", str(tmp_path / "job.yaml")]):
        assert resolve_settings(arguments)[0].allowed_failures(1000) == allowed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_bach: 3\n", "unknown setting 'max_bach'; did you mean 'max_batch'?"),
        ("- a\n- b\n", "must contain"),
        ("{", "cannot be read"),
        ("config: other.yaml\n", "unknown setting 'config'"),
        ("workers: many\n", "--workers in .*job.yaml: "),
        (None, "cannot be read"),
    ],
)
def test_invalid_file_is_reported_in_one_sentence(tmp_path, content, message):
    file = tmp_path / "job.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadInput, match=message):
        resolve_settings(["--manifest", "m", "--config", str(file)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no manifest"),
        (["--manifest", "m", "--bogus", "1"], "unrecognized arguments: --bogus 1"),
        (["--manifest", "m", "--seed"], "--seed: expected one argument"),
        (["--manifest", "m", "--format", "wma"], "--format: Input should be 'wav', 'flac', 'mp3' or 'opus'"),
        (["--manifest", "m", "--format", "opus", "--sample-rate", "44100"], "44,?100"),
    ],
)
def test_invalid_flags_are_reported_in_one_sentence(flags, message):
    with pytest.raises(BadInput, match=message) as caught:
        resolve_settings(flags)
    assert "\n" not in str(caught.value)


def test_invalid_environment_variables_are_reported_by_name(capsys):
    with environment(workers="many"), pytest.raises(BadInput, match="HIGGS_WORKERS: "):
        resolve_settings(["--manifest", "m"])
    with environment(worker="2", api_keys="secret", max_replicas="2"):
        resolve_settings(["--manifest", "m"])
    stderr = capsys.readouterr().err
    assert "HIGGS_WORKER; did you mean HIGGS_WORKERS?" in stderr
    assert stderr.count("\n") == 1
    assert "secret" not in stderr


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAEXAMPLE:hunter2@books/scripts",
        "s3://books/scripts?access_key=AKIAEXAMPLE&secret_key=hunter2",
        "https://books.example/m.parquet?X-Amz-Signature=hunter2",
        "gs://hunter2@books/scripts",
    ],
)
@pytest.mark.parametrize("name", ["manifest", "output", "voices", "model"])
def test_credentials_in_a_uri_are_refused_and_not_echoed(capsys, name, uri):
    status = main(["--manifest", "m", f"--{name}", uri])
    stdout, stderr = capsys.readouterr()
    assert status == 2
    assert f"--{name}" in stderr
    assert "credentials do not belong" in stderr
    assert "hunter2" not in stdout + stderr


def test_ordinary_uris_are_not_taken_for_credentials():
    for uri in ("s3://books/a@b", "/a/path?key=of", "s3://books/what?", "bosonai/higgs-audio-v2-tokenizer"):
        assert JobSettings(manifest=uri, model=uri)
