"""Audio files: exact lengths, atomic, and with bytes independent of block sizes."""

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
        start, block = 0, 0
        while start < len(samples):
            size = sizes[block % len(sizes)]
            writer.write(samples[start : start + size])
            start, block = start + size, block + 1
        return writer.finish()


@pytest.mark.parametrize("file_format", FORMATS)
def test_written_file_matches_its_record(tmp_path, file_format):
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
def test_file_is_independent_of_block_sizes(sizes, file_format, output_rate):
    with tempfile.TemporaryDirectory() as folder:
        expected = write(Path(folder) / "a", sound(), file_format, output_rate=output_rate)
        written = write(Path(folder) / "b", sound(), file_format, sizes, output_rate)
    assert written.sha256 == expected.sha256


@pytest.mark.parametrize("file_format", FORMATS)
def test_writer_resamples_to_the_output_rate(tmp_path, file_format):
    written = write(tmp_path / "x", sound(2.0), file_format, output_rate=48_000)
    assert soundfile.info(written.path).samplerate == written.sample_rate_hz == 48_000
    assert written.num_samples == 2 * 48_000
    assert written.duration_s == 2.0


def test_exception_leaves_no_file(tmp_path):
    def fail_while_writing():
        with AudioWriter(tmp_path / "x.wav", "wav", RATE) as writer:
            writer.write(sound())
            raise KeyError("gone")

    with pytest.raises(KeyError):
        fail_while_writing()
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_replaced_only_when_the_new_one_is_complete(tmp_path):
    path = tmp_path / "x.wav"
    path.write_bytes(b"old")
    with AudioWriter(path, "wav", RATE) as writer:
        writer.write(sound())
        assert path.read_bytes() == b"old"
        writer.finish()
    assert soundfile.info(path).frames == RATE


@pytest.mark.parametrize(("file_format", "rate"), [("opus", 44_100), ("mp3", 96_000)])
def test_unsupported_sample_rate_raises(tmp_path, file_format, rate):
    with pytest.raises(BadInput, match=f"{file_format} does not support {rate} Hz"):
        AudioWriter(tmp_path / "x", file_format, RATE, rate)
    assert list(tmp_path.iterdir()) == []


def test_wav_beyond_its_size_limit_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "_MAX_WAV_BYTES", 100_000)
    with pytest.raises(BadInput, match="use flac"):
        write(tmp_path / "x.wav", sound(3.0), "wav")
    assert write(tmp_path / "x.flac", sound(3.0), "flac").num_samples == 3 * RATE


def test_to_pcm16_clips_instead_of_wrapping():
    values = np.array([2.0, 1.0, 0.99999, -1.0, -2.0, 0.0, 1.5 / 32768], np.float32)
    assert to_pcm16(values).tolist() == [32767, 32767, 32767, -32768, -32768, 0, 2]


@pytest.mark.parametrize("file_format", FORMATS)
def test_writing_no_samples_raises(tmp_path, file_format):
    with pytest.raises(BadInput, match="no samples"):
        write(tmp_path / "x", np.empty(0, np.float32), file_format)
    assert list(tmp_path.iterdir()) == []


def test_opus_pages_have_serial_zero_and_valid_checksums(tmp_path):
    """Compare each page with a bitwise implementation of the checksum."""
    data = write(tmp_path / "x.opus", sound(3.0), "opus").path.read_bytes()
    pages = [b"OggS" + rest for rest in data.split(b"OggS") if rest]
    assert len(pages) > 3
    for page in pages:
        assert page[14:18] == bytes(4)
        register = 0
        for byte in page[:22] + bytes(4) + page[26:]:
            register ^= byte << 24
            for _ in range(8):
                register = (register << 1 ^ 0x04C11DB7 if register & 0x80000000 else register << 1) & 0xFFFFFFFF
        assert register.to_bytes(4, "little") == page[22:26]
