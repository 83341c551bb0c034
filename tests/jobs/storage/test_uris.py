"""Voices in a folder, and on a real S3 server over HTTP."""

import io

import numpy as np
import pytest
import soundfile

from higgs_model.errors import BadInput
from jobs.storage.uris import open_voices, read_bytes


def encode_noise(duration_s=4.0, seed=0):
    file = io.BytesIO()
    samples = 0.1 * np.random.default_rng(seed).standard_normal(int(24000 * duration_s))
    soundfile.write(file, samples, 24000, format="WAV", subtype="PCM_16")
    return file.getvalue()


FILES = {
    "ada.wav": encode_noise(seed=1),
    "ada.txt": b"Eight words that somebody says in four seconds.",
    "bob.flac": b"not audio at all",
    "profile.yaml": b"profiles: {calm: a calm old man}",
}


@pytest.fixture(params=["folder", "s3"])
def library(request, tmp_path, monkeypatch):
    if request.param == "folder":
        for name, content in FILES.items():
            (tmp_path / name).write_bytes(content)
        return str(tmp_path)
    bucket = request.getfixturevalue("bucket")
    bucket.set_environment(monkeypatch)
    for name, content in FILES.items():
        bucket.put(f"voices/{name}", content)
    return f"{bucket.uri}/voices"


def test_library_is_the_same_in_a_folder_and_on_s3(library):
    voices = open_voices(library)
    assert voices.names() == ["ada", "bob"]
    assert voices.profiles() == {"calm": "a calm old man"}
    ada = voices.recording("ada")
    assert ada.transcript == FILES["ada.txt"].decode()
    assert ada.duration_s == 4.0
    with pytest.raises(BadInput, match="not a readable recording"):
        voices.recording("bob").warnings()
    with pytest.raises(BadInput, match="'eda'"):
        voices.recording("eda")


def test_reference_recordings_are_read_from_any_uri(library):
    voices = open_voices(None)
    assert voices.load_reference(f"{library}/ada.wav", "Its transcript.").duration_s == 4.0
    assert read_bytes(f"{library}/ada.txt") == FILES["ada.txt"]
    with pytest.raises(BadInput, match="ref_audio .* cannot be read"):
        voices.load_reference(f"{library}/none.wav", None)


def test_missing_library_is_reported_in_one_sentence(library, tmp_path):
    with pytest.raises(BadInput, match="is not a folder or prefix"):
        open_voices(f"{library}/none")
    with pytest.raises(BadInput, match="cannot be opened"):
        open_voices("ftp://example.org/voices")
