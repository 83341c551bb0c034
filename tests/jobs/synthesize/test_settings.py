"""Where a job's settings come from, who goes before whom, and what is never repeated."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from higgs_model.errors import BadInput
from jobs.synthesize.cli import main
from jobs.synthesize.settings import JobSettings, gather, told

PLACES = ("default", "file", "environment", "flags")


@given(st.dictionaries(st.sampled_from(PLACES[1:]), st.integers(1, 99)))
def test_flags_go_before_the_environment_before_the_file_before_defaults(tmp_path_factory, values):
    file = tmp_path_factory.mktemp("settings") / "job.yaml"
    file.write_text("manifest: m.jsonl\n" + (f"max-batch: {values['file']}\n" if "file" in values else ""))
    environment = {"HIGGS_MAX_BATCH": str(values["environment"])} if "environment" in values else {}
    flags = ["--max-batch", str(values["flags"])] if "flags" in values else []
    settings, sources = gather(["--config", str(file), *flags], environment)
    first = max(values, key=PLACES.index, default="default")
    assert settings.max_batch == values.get(first)
    assert sources.get("max_batch") == {"default": None, "file": str(file)}.get(first, first)
    said = told(settings, sources)
    assert ("max_batch" in said) == (first != "default")
    assert "manifest=" in said
    assert "\n" not in said


def test_every_setting_can_come_from_the_environment():
    given = {"voice_in_system": "true", "check": "json:loads", "max_failed": "3", "format": "flac", "seed": "7"}
    settings, sources = gather(["--manifest", "m"], {f"HIGGS_{name.upper()}": value for name, value in given.items()})
    assert {name: str(getattr(settings, name)).lower() for name in given} == given
    assert {name: sources[name] for name in given} == dict.fromkeys(given, "environment")


def test_what_is_wrong_in_the_environment_is_said_by_its_name(capsys):
    with pytest.raises(BadInput, match="HIGGS_WORKERS: "):
        gather(["--manifest", "m"], {"HIGGS_WORKERS": "many"})
    gather(["--manifest", "m"], {"HIGGS_WORKER": "2", "HIGGS_API_KEYS": "secret", "HIGGS_MAX_REPLICAS": "2"})
    said = capsys.readouterr().err
    assert "HIGGS_WORKER, which is no setting; did you mean HIGGS_WORKERS?" in said
    assert said.count("\n") == 1
    assert "secret" not in said


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
def test_a_secret_in_a_uri_is_refused_and_not_repeated(capsys, name, uri):
    status = main(["--manifest", "m", f"--{name}", uri])
    out, said = capsys.readouterr()
    assert status == 2
    assert f"--{name}" in said
    assert "credentials do not belong" in said
    assert "hunter2" not in out + said


def test_uris_as_they_should_be_are_none(tmp_path):
    for uri in ("s3://books/a@b", "/a/path?key=of", "s3://books/what?", "bosonai/higgs-audio-v2-tokenizer"):
        assert JobSettings(manifest=uri, model=uri)
