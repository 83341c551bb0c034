"""Shared fixtures: tiny codec checkpoints, loaded once per worker."""

import pytest

from higgs_model import HiggsAudioCodec
from tests.higgs_model.codec import golden


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """Return `load(name)`, which loads a tiny codec checkpoint in the original layout."""
    loaded = {}

    def _load(name):
        if name not in loaded:
            folder = golden.write_original(name, tmp_path_factory.mktemp("codec") / name)
            loaded[name] = HiggsAudioCodec.from_pretrained(folder)
        return loaded[name]

    return _load


@pytest.fixture
def codec(load):
    return load("rvq_24khz")
