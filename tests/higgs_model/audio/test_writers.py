"""Files: exact lengths, the same bytes however the samples came, whole or not there."""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_model.audio import writers
from higgs_model.audio.writers import FORMATS, AudioWriter, to_pcm16
from higgs_model.errors import BadInput

RATE = 24_000


def sound(seconds=1.0, level=0.3):
    time = np.arange(round(seconds * RATE))
    return (level * np.sin(time * 0.05) * (0.6 + 0.4 * np.sin(time * 0.0007))).astype(np.float32)


def write(path, samples, file_format, sizes=(100_000,), output_rate=None):
    with AudioWriter(path, file_format, RATE, output_rate) as writer:
        start, turn = 0, 0
        while start < len(samples):
            size = sizes[turn % len(sizes)]
            writer.write(samples[start : start + size])
            start, turn = start + size, turn + 1
        return writer.finish()


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_is_declared_is_in_the_file(tmp_path, file_format):
    samples = sound(2.0)
    written = write(tmp_path / f"x.{file_format}", samples, file_format)
    read, rate = soundfile.read(written.path, dtype="float32")
    assert rate == written.sample_rate_hz == RATE
    assert written.num_samples == len(samples)
    assert written.sha256 == hashlib.sha256(written.path.read_bytes()).hexdigest()
    assert written.num_bytes == written.path.stat().st_size
    assert abs(len(read) - len(samples)) <= (0 if file_format in ("wav", "flac") else 0.06 * RATE)
    assert 0.9 < np.std(read) / np.std(samples) < 1.1
    if file_format in ("wav", "flac"):
        np.testing.assert_allclose(read, samples, atol=0.51 / 32768)
    assert [path.name for path in tmp_path.iterdir()] == [f"x.{file_format}"]


@settings(max_examples=10)
@given(
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=4),
    file_format=st.sampled_from(FORMATS),
    output_rate=st.sampled_from([None, 16_000, 48_000]),
)
def test_portions_do_not_matter(sizes, file_format, output_rate):
    with tempfile.TemporaryDirectory() as folder:
        whole = write(Path(folder) / "a", sound(), file_format, output_rate=output_rate)
        parts = write(Path(folder) / "b", sound(), file_format, sizes, output_rate)
    assert parts.sha256 == whole.sha256


@pytest.mark.parametrize("file_format", FORMATS)
def test_another_rate(tmp_path, file_format):
    written = write(tmp_path / "x", sound(2.0), file_format, output_rate=48_000)
    assert soundfile.info(written.path).samplerate == written.sample_rate_hz == 48_000
    assert written.num_samples == 2 * 48_000
    assert written.duration_s == 2.0


def test_an_exception_leaves_nothing(tmp_path):
    def broken():
        with AudioWriter(tmp_path / "x.wav", "wav", RATE) as writer:
            writer.write(sound())
            raise KeyError("gone")

    with pytest.raises(KeyError):
        broken()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_there_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x.wav"
    path.write_bytes(b"old")
    with AudioWriter(path, "wav", RATE) as writer:
        writer.write(sound())
        assert path.read_bytes() == b"old"
        writer.finish()
    assert soundfile.info(path).frames == RATE


@pytest.mark.parametrize(("file_format", "rate"), [("opus", 44_100), ("mp3", 96_000)])
def test_rates_that_a_format_cannot_hold_are_named(tmp_path, file_format, rate):
    with pytest.raises(BadInput, match=f"{file_format} cannot hold {rate} Hz"):
        AudioWriter(tmp_path / "x", file_format, RATE, rate)
    assert list(tmp_path.iterdir()) == []


def test_a_wav_too_long_for_its_header_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "_WAV_BYTES", 100_000)
    with pytest.raises(BadInput, match="use flac"):
        write(tmp_path / "x.wav", sound(3.0), "wav")
    assert write(tmp_path / "x.flac", sound(3.0), "flac").num_samples == 3 * RATE


def test_full_scale_is_clipped_not_wrapped():
    values = np.array([2.0, 1.0, 0.99999, -1.0, -2.0, 0.0, 1.5 / 32768], np.float32)
    assert to_pcm16(values).tolist() == [32767, 32767, 32767, -32768, -32768, 0, 2]


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_without_a_sample_is_refused(tmp_path, file_format):
    with pytest.raises(BadInput, match="no sample"):
        write(tmp_path / "x", np.empty(0, np.float32), file_format)
    assert list(tmp_path.iterdir()) == []


def test_renumbered_pages_have_right_checksums(tmp_path):
    """Each page is checked against the plain definition of the checksum, bit by bit."""
    data = write(tmp_path / "x.opus", sound(3.0), "opus").path.read_bytes()
    pages = [part for part in data.split(b"OggS") if part]
    assert len(pages) > 3
    for page in pages:
        whole = b"OggS" + page
        assert whole[14:18] == bytes(4)
        register = 0
        for byte in whole[:22] + bytes(4) + whole[26:]:
            register ^= byte << 24
            for _ in range(8):
                register = (register << 1 ^ 0x04C11DB7 if register & 0x80000000 else register << 1) & 0xFFFFFFFF
        assert register.to_bytes(4, "little") == whole[22:26]
