"""Files of every kind: each is read, or gives one clear sentence with its name."""

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
def test_wav_of_every_depth_and_rate(tmp_path, subtype, rate_hz):
    soundfile.write(tmp_path / "a.wav", tone(rate_hz), rate_hz, subtype=subtype)
    recording = read_recording(tmp_path / "a.wav")
    assert recording.sample_rate_hz == rate_hz
    assert recording.duration_s == 0.5
    np.testing.assert_allclose(recording.samples, tone(rate_hz), atol=SUBTYPES[subtype])


def test_stereo_over_several_blocks_is_mixed_down(tmp_path, monkeypatch):
    monkeypatch.setattr("higgs_model.audio.files._BLOCK_FRAMES", 1000)
    both = np.stack([tone(8000), np.zeros(4000, np.float32)], axis=1)
    soundfile.write(tmp_path / "a.flac", both, 8000)
    np.testing.assert_allclose(read_recording(tmp_path / "a.flac").samples, tone(8000) / 2, atol=4e-5)


def test_an_open_file_is_read():
    file = io.BytesIO()
    soundfile.write(file, tone(8000), 8000, format="OGG", subtype="VORBIS")
    file.seek(0)
    assert len(read_recording(file).samples) == 4000


def write_text(path):
    path.write_text("This is not sound, whatever its name says.")


def write_header_alone(path):
    soundfile.write(path, np.zeros(0), 8000)


def write_nan(path):
    soundfile.write(path, np.array([0, np.nan]), 8000, subtype="FLOAT")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.touch(), r"a\.wav: the file is empty \(0 bytes\)"),
        (write_text, r"a\.wav: not a recording that can be read \(Format not recognised\)"),
        (write_header_alone, r"a\.wav: a recording without a single sample"),
        (write_nan, r"a\.wav: recording: 1 of its 2 samples are not numbers"),
        (lambda path: path.mkdir(), r"a\.wav: a folder"),
        (lambda path: None, r"a\.wav: there is no such file"),
    ],
)
def test_what_is_no_recording_is_refused_in_a_sentence(tmp_path, make, message):
    make(tmp_path / "a.wav")
    with pytest.raises(BadInput, match=message):
        read_recording(tmp_path / "a.wav")


def test_an_open_file_is_called_what_it_is_said_to_be():
    with pytest.raises(BadInput, match="voices/anna: not a recording"):
        read_recording(io.BytesIO(b"nothing"), name="voices/anna")
