"""Codecs that many tests share: the tiny checkpoints, loaded once a worker."""

import pytest

from higgs_model import HiggsAudioCodec
from tests.higgs_model.codec import golden


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """`load(name)`: a tiny checkpoint of the original layout, loaded."""
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
