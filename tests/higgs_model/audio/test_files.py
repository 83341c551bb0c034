"""Files of every kind are read, or raise one clear sentence with their name."""

import io

import numpy as np
import pytest
import soundfile

from higgs_model.audio.files import read_recording
from higgs_model.errors import BadInput

SUBTYPES = {"PCM_U8": 8e-3, "PCM_16": 4e-5, "PCM_24": 2e-7, "PCM_32": 1e-7, "FLOAT": 0, "DOUBLE": 0}


def tone(rate_hz, duration_s=0.5):
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate_hz * duration_s)) / rate_hz)).astype(np.float32)


@pytest.mark.parametrize("subtype", SUBTYPES)
@pytest.mark.parametrize("rate_hz", [8000, 24000, 192000])
def test_read_recording_supports_every_wav_depth_and_rate(tmp_path, subtype, rate_hz):
    soundfile.write(tmp_path / "a.wav", tone(rate_hz), rate_hz, subtype=subtype)
    recording = read_recording(tmp_path / "a.wav")
    assert recording.sample_rate_hz == rate_hz
    assert recording.duration_s == 0.5
    np.testing.assert_allclose(recording.samples, tone(rate_hz), atol=SUBTYPES[subtype])


def test_read_recording_mixes_stereo_down_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr("higgs_model.audio.files._BLOCK_FRAMES", 1000)
    stereo = np.stack([tone(8000), np.zeros(4000, np.float32)], axis=1)
    soundfile.write(tmp_path / "a.flac", stereo, 8000)
    np.testing.assert_allclose(read_recording(tmp_path / "a.flac").samples, tone(8000) / 2, atol=4e-5)


def test_read_recording_accepts_an_open_file():
    file = io.BytesIO()
    soundfile.write(file, tone(8000), 8000, format="OGG", subtype="VORBIS")
    file.seek(0)
    assert len(read_recording(file).samples) == 4000


def write_text(path):
    path.write_text("This is not audio, despite the file name.")


def write_header_only(path):
    soundfile.write(path, np.zeros(0), 8000)


def write_nan(path):
    soundfile.write(path, np.array([0, np.nan]), 8000, subtype="FLOAT")


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda path: path.touch(), r"a\.wav: the file is empty \(0 bytes\)"),
        (write_text, r"a\.wav: not a readable recording \(Format not recognised\)"),
        (write_header_only, r"a\.wav: the recording has no samples"),
        (write_nan, r"a\.wav: recording: 1 of 2 samples are NaN or infinite"),
        (lambda path: path.mkdir(), r"a\.wav: is a folder"),
        (lambda path: None, r"a\.wav: no such file"),
    ],
)
def test_read_recording_names_the_file_and_the_problem(tmp_path, create, message):
    create(tmp_path / "a.wav")
    with pytest.raises(BadInput, match=message):
        read_recording(tmp_path / "a.wav")


def test_read_recording_uses_the_given_name_in_errors():
    with pytest.raises(BadInput, match="voices/anna: not a readable recording"):
        read_recording(io.BytesIO(b"nothing"), name="voices/anna")
