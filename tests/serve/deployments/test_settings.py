"""Settings of the endpoint: precedence, validation, and API keys."""

import hashlib
import logging

import pytest

from higgs_model.errors import BadConfig
from serve.deployments.settings import key_digests, resolve_config


def test_arguments_override_the_environment(monkeypatch, caplog):
    for name, value in {"MODEL": "there", "MAX_BATCH": "8", "MODLE": "x", "VOICE_ALIASES": "nova=ann"}.items():
        monkeypatch.setenv(f"HIGGS_{name}", value)
    with caplog.at_level(logging.WARNING):
        config = resolve_config({"max_batch": "4"})
    assert (config.model, config.max_batch, config.voice_aliases) == ("there", 4, {"nova": "ann"})
    assert "HIGGS_MODLE" in caplog.text
    assert "'model'" in caplog.text


@pytest.mark.parametrize("value", ["alloy=ann,echo=bob", {"alloy": "ann", "echo": "bob"}])
def test_aliases_may_be_a_mapping_or_text(value):
    assert resolve_config({"voice_aliases": value}).voice_aliases == {"alloy": "ann", "echo": "bob"}


def test_reference_urls_may_be_a_list_or_text(monkeypatch):
    urls = ("https://a.example/x/", "https://b.example/y/")
    assert resolve_config({"reference_urls": list(urls)}).reference_urls == urls
    monkeypatch.setenv("HIGGS_REFERENCE_URLS", ", ".join(urls))
    assert resolve_config({}).reference_urls == urls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modle": "x"}, "did you mean 'model'"),
        ({"max_batch": "many"}, "max_batch"),
        ({"max_batch": "0"}, "max_batch"),
        ({"min_replicas": 3}, "max_replicas=1 is less than min_replicas=3"),
        ({"reference_urls": "http://x.example/"}, "not a prefix"),
        ({"reference_urls": "https://x.example"}, "not a prefix"),
    ],
)
def test_invalid_settings_are_refused_in_one_sentence(arguments, message):
    with pytest.raises(BadConfig, match=message) as caught:
        resolve_config(arguments)
    assert "\n" not in str(caught.value)


def test_api_keys_come_from_the_environment_and_from_a_file(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# comment\none\n\n two \n")
    config = resolve_config({"api_keys_file": str(file)})
    monkeypatch.setenv("HIGGS_API_KEYS", "three, four,")
    assert key_digests(config) == {hashlib.sha256(key).digest() for key in (b"one", b"two", b"three", b"four")}
    monkeypatch.delenv("HIGGS_API_KEYS")
    assert key_digests(resolve_config({})) == frozenset()
    file.write_text("\n")
    with pytest.raises(BadConfig, match="contains no key"):
        key_digests(config)
    file.unlink()
    with pytest.raises(BadConfig, match="cannot be read"):
        key_digests(config)
