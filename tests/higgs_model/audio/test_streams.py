"""Stream encoders: decodable, incremental, independent of block sizes. Time stretching: exact duration, same pitch."""

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_model.audio.streams import MEDIA_TYPES, STREAM_FORMATS, StreamEncoder
from higgs_model.audio.time_stretch import TimeStretcher
from higgs_model.audio.writers import to_pcm16
from higgs_model.errors import BadInput

RATE = 24_000
SIZES = st.lists(st.integers(1, 9000), min_size=1, max_size=4)


def sound(seconds=1.5):
    index = np.arange(round(seconds * RATE))
    return (0.3 * np.sin(index * 0.05) * (0.6 + 0.4 * np.sin(index * 0.0007))).astype(np.float32)


def split_into_blocks(samples, sizes):
    start, block = 0, 0
    while start < len(samples):
        size = sizes[block % len(sizes)]
        yield samples[start : start + size]
        start, block = start + size, block + 1


def encode(stream_format, pcm, sizes=(100_000,)):
    encoder = StreamEncoder(stream_format, RATE)
    return [encoder.write(part) for part in split_into_blocks(pcm, sizes)] + [encoder.finish()]


@settings(max_examples=15)
@given(sizes=SIZES, stream_format=st.sampled_from([name for name in STREAM_FORMATS if name != "opus"]))
def test_encoder_output_is_independent_of_block_sizes(sizes, stream_format):
    pcm = to_pcm16(sound())
    assert b"".join(encode(stream_format, pcm, sizes)) == b"".join(encode(stream_format, pcm))


@pytest.mark.parametrize("stream_format", ["wav", "mp3", "opus"])
def test_stream_decodes_to_the_input(stream_format):
    pcm = to_pcm16(sound())
    read, rate = soundfile.read(io.BytesIO(b"".join(encode(stream_format, pcm, [1000]))), dtype="int16")
    assert rate == RATE
    if stream_format == "wav":
        np.testing.assert_array_equal(read, pcm)
    assert abs(len(read) - len(pcm)) < 0.1 * RATE
    # Compare after compensating for the delay of the encoder.
    lag = np.argmax(np.correlate(read[: RATE // 2].astype(float), pcm[:4800].astype(float), "valid"))
    assert np.corrcoef(read[lag : lag + 9600], pcm[:9600])[0, 1] > 0.98


@pytest.mark.parametrize("stream_format", STREAM_FORMATS)
def test_encoder_emits_bytes_long_before_the_end(stream_format):
    parts = encode(stream_format, to_pcm16(sound(4.0)), [2400])
    sizes = np.cumsum([len(part) for part in parts])
    assert sizes[len(parts) // 4] > 0.1 * sizes[-1]
    assert MEDIA_TYPES[stream_format].startswith("audio/")


def test_mp3_stream_starts_with_audio_and_without_header():
    content = b"".join(encode("mp3", to_pcm16(sound())))
    assert content[0] == 0xFF
    assert content[1] & 0xE0 == 0xE0
    # LAME's metadata frame would contain zeros, or Xing.
    assert any(content[4:36])
    assert not any(tag in content for tag in (b"Xing", b"Info", b"ID3"))


def test_empty_stream_is_valid():
    empty = {name: b"".join(encode(name, np.empty(0, np.int16))) for name in STREAM_FORMATS}
    assert {name for name, content in empty.items() if not content} == {"pcm", "flac", "mp3"}
    assert len(soundfile.read(io.BytesIO(empty["wav"]))[0]) == 0
    assert empty["opus"].startswith(b"OggS")


def test_unsupported_sample_rate_raises():
    with pytest.raises(BadInput, match="44100"):
        StreamEncoder("opus", 44_100)


def stretch(samples, speed, sizes=(100_000,)):
    stretcher = TimeStretcher(speed, RATE)
    blocks = split_into_blocks(samples, sizes)
    return np.concatenate([*(stretcher.push(block) for block in blocks), stretcher.finish()])


@settings(max_examples=20)
@given(sizes=SIZES, speed=st.floats(0.25, 4.0), seconds=st.floats(0.001, 1.0))
def test_stretched_length_is_exact_and_independent_of_block_sizes(sizes, speed, seconds):
    samples = sound(seconds)
    stretched = stretch(samples, speed, sizes)
    np.testing.assert_array_equal(stretched, stretch(samples, speed))
    assert len(stretched) == pytest.approx(len(samples) / speed, rel=2e-3, abs=2)
    assert np.isfinite(stretched).all()


def test_speed_one_returns_the_input():
    samples = sound()
    np.testing.assert_array_equal(stretch(samples, 1.0, [777]), samples)


@pytest.mark.parametrize("speed", [0.25, 0.8, 1.3, 2.0, 3.0, 4.0])
def test_stretching_preserves_timing_and_pitch(speed):
    """Two tones separated by silence start at the scaled times and keep their pitch."""
    tone = 0.5 * np.sin(2 * np.pi * 300 * np.arange(12_000) / RATE)
    silence = np.zeros(12_000)
    stretched = stretch(np.concatenate([silence, tone, silence, tone]).astype(np.float32), speed)
    loud = np.abs(stretched) > 0.25
    edges = np.flatnonzero(np.convolve(loud, np.ones(400), "same")[:-1] > 0)
    starts = [edges[0], *(edges[1:][np.diff(edges) > 400])]
    assert np.array(starts) * speed / RATE == pytest.approx([0.5, 1.5], abs=0.09)
    assert np.flatnonzero(loud)[-1] * speed / RATE == pytest.approx(2.0, abs=0.01)
    first_tone = stretched[starts[0] + 1000 : starts[0] + int(10_000 / speed)]
    spectrum = np.abs(np.fft.rfft(first_tone * np.hanning(len(first_tone)), 1 << 18))
    assert spectrum.argmax() * RATE / (1 << 18) == pytest.approx(300, rel=0.02)


@pytest.mark.parametrize("speed", [0.2, 4.1, 0, -1, float("nan")])
def test_invalid_speed_raises(speed):
    with pytest.raises(BadInput, match="speed"):
        TimeStretcher(speed, RATE)
