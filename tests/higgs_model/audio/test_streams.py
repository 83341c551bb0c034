"""Streams: the same sound as files, in any portions, with nothing taken back; speed that keeps length and pitch."""

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_model.audio.speed import SpeedChanger
from higgs_model.audio.streams import MEDIA_TYPES, STREAM_FORMATS, StreamEncoder
from higgs_model.audio.writers import to_pcm16
from higgs_model.errors import BadInput

RATE = 24_000
SIZES = st.lists(st.integers(1, 9000), min_size=1, max_size=4)


def sound(seconds=1.5):
    at = np.arange(round(seconds * RATE))
    return (0.3 * np.sin(at * 0.05) * (0.6 + 0.4 * np.sin(at * 0.0007))).astype(np.float32)


def portions(samples, sizes):
    start, turn = 0, 0
    while start < len(samples):
        size = sizes[turn % len(sizes)]
        yield samples[start : start + size]
        start, turn = start + size, turn + 1


def encode(stream_format, pcm, sizes=(100_000,)):
    encoder = StreamEncoder(stream_format, RATE)
    return [encoder.write(part) for part in portions(pcm, sizes)] + [encoder.finish()]


@settings(max_examples=15)
@given(sizes=SIZES, stream_format=st.sampled_from([one for one in STREAM_FORMATS if one != "opus"]))
def test_portions_do_not_matter(sizes, stream_format):
    pcm = to_pcm16(sound())
    assert b"".join(encode(stream_format, pcm, sizes)) == b"".join(encode(stream_format, pcm))


@pytest.mark.parametrize("stream_format", ["wav", "mp3", "opus"])
def test_a_stream_is_the_sound(stream_format):
    pcm = to_pcm16(sound())
    read, rate = soundfile.read(io.BytesIO(b"".join(encode(stream_format, pcm, [1000]))), dtype="int16")
    assert rate == RATE
    if stream_format == "wav":
        np.testing.assert_array_equal(read, pcm)
    assert abs(len(read) - len(pcm)) < 0.1 * RATE
    # An encoder's delay is no other sound.
    lag = np.argmax(np.correlate(read[: RATE // 2].astype(float), pcm[:4800].astype(float), "valid"))
    assert np.corrcoef(read[lag : lag + 9600], pcm[:9600])[0, 1] > 0.98


@pytest.mark.parametrize("stream_format", STREAM_FORMATS)
def test_bytes_come_long_before_the_end(stream_format):
    parts = encode(stream_format, to_pcm16(sound(4.0)), [2400])
    sizes = np.cumsum([len(part) for part in parts])
    assert sizes[len(parts) // 4] > 0.1 * sizes[-1]
    assert MEDIA_TYPES[stream_format].startswith("audio/")


def test_an_mp3_stream_begins_with_sound_and_not_with_a_header():
    content = b"".join(encode("mp3", to_pcm16(sound())))
    assert content[0] == 0xFF
    assert content[1] & 0xE0 == 0xE0
    # The frame that LAME puts in front holds zeros, or Xing, and no sound.
    assert any(content[4:36])
    assert not any(mark in content for mark in (b"Xing", b"Info", b"ID3"))


def test_nothing_is_a_stream_too():
    empty = {name: b"".join(encode(name, np.empty(0, np.int16))) for name in STREAM_FORMATS}
    assert {name for name, content in empty.items() if not content} == {"pcm", "flac", "mp3"}
    assert len(soundfile.read(io.BytesIO(empty["wav"]))[0]) == 0
    assert empty["opus"].startswith(b"OggS")


def test_a_rate_that_a_format_cannot_hold_is_refused():
    with pytest.raises(BadInput, match="44100"):
        StreamEncoder("opus", 44_100)


def change(samples, speed, sizes=(100_000,)):
    changer = SpeedChanger(speed, RATE)
    return np.concatenate([*(changer.push(part) for part in portions(samples, sizes)), changer.finish()])


@settings(max_examples=20)
@given(sizes=SIZES, speed=st.floats(0.25, 4.0), seconds=st.floats(0.001, 1.0))
def test_speed_gives_its_share_of_samples_however_they_come(sizes, speed, seconds):
    samples = sound(seconds)
    changed = change(samples, speed, sizes)
    np.testing.assert_array_equal(changed, change(samples, speed))
    assert len(changed) == pytest.approx(len(samples) / speed, rel=2e-3, abs=2)
    assert np.isfinite(changed).all()


def test_speed_one_changes_nothing():
    samples = sound()
    np.testing.assert_array_equal(change(samples, 1.0, [777]), samples)


@pytest.mark.parametrize("speed", [0.25, 0.8, 1.3, 2.0, 3.0, 4.0])
def test_what_sounds_when_is_kept(speed):
    """Two tones with silence between them, each where it should be, at its own pitch."""
    tone = 0.5 * np.sin(2 * np.pi * 300 * np.arange(12_000) / RATE)
    quiet = np.zeros(12_000)
    changed = change(np.concatenate([quiet, tone, quiet, tone]).astype(np.float32), speed)
    loud = np.abs(changed) > 0.25
    edges = np.flatnonzero(np.convolve(loud, np.ones(400), "same")[:-1] > 0)
    starts = [edges[0], *(edges[1:][np.diff(edges) > 400])]
    assert np.array(starts) * speed / RATE == pytest.approx([0.5, 1.5], abs=0.09)
    assert np.flatnonzero(loud)[-1] * speed / RATE == pytest.approx(2.0, abs=0.01)
    piece = changed[starts[0] + 1000 : starts[0] + int(10_000 / speed)]
    spectrum = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 1 << 18))
    assert spectrum.argmax() * RATE / (1 << 18) == pytest.approx(300, rel=0.02)


@pytest.mark.parametrize("speed", [0.2, 4.1, 0, -1, float("nan")])
def test_a_speed_that_cannot_be_is_refused(speed):
    with pytest.raises(BadInput, match="speed"):
        SpeedChanger(speed, RATE)
