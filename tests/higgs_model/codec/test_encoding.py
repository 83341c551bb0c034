"""Encoding of recordings of every kind: each is encoded or rejected with a clear message."""

import copy

import numpy as np
import pytest
import torch

from higgs_model.audio.files import read_recording
from higgs_model.codec import acoustic, network
from higgs_model.errors import BadInput
from tests.higgs_model.codec import golden


def test_batch_equals_single_recordings(codec):
    recordings = [golden.recording(length, seed) for length, seed in ((9600, 0), (700, 1), (9600, 2), (4801, 3))]
    for codes, samples in zip(codec.encode_batch(recordings, codec.sample_rate), recordings, strict=True):
        assert torch.equal(codes, codec.encode(samples, codec.sample_rate))


def test_stereo_is_mixed_down(codec):
    left, right = golden.recording(9600, 0), golden.recording(9600, 1)
    mixed = codec.encode((left + right) / 2, codec.sample_rate)
    assert torch.equal(codec.encode(np.stack([left, right]), codec.sample_rate), mixed)
    assert torch.equal(codec.encode(torch.from_numpy(np.stack([left, right])), codec.sample_rate), mixed)


@pytest.mark.parametrize("rate_hz", [8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000, 192000])
def test_every_sample_rate_is_supported(codec, rate_hz):
    codes = codec.encode(golden.recording(rate_hz // 2), rate_hz)
    assert codes.shape[0] == 8
    assert codes.shape[1] in (12, 13)
    assert torch.equal(codec.encode(golden.recording(rate_hz // 2), np.int64(rate_hz)), codes)


@pytest.mark.parametrize("name", golden.NAMES)
@pytest.mark.parametrize("num_samples", [1, 160, 240, 311, 631, 632])
def test_recording_shorter_than_a_frame_is_padded(load, name, num_samples):
    codec = load(name)
    assert codec.encode(golden.recording(num_samples), codec.sample_rate).shape[1] >= 1


@pytest.mark.parametrize("samples", [np.zeros(9600), np.ones(9600), 3 * golden.recording(9600)])
@pytest.mark.parametrize("normalized", [False, True])
def test_silence_and_clipped_audio_are_encoded(codec, samples, normalized):
    codes = codec.encode(samples, codec.sample_rate, normalized=normalized)
    assert codes.shape == (8, 10)
    assert torch.isfinite(codec.decode(codes)).all()


@pytest.mark.parametrize(
    ("waveform", "rate_hz", "message"),
    [
        (np.array([0.0, np.nan, np.inf]), 24000, "2 of 3 samples are NaN or infinite, the first at sample 1"),
        (np.zeros(0), 24000, "it is empty"),
        (np.zeros(10, np.int16), 24000, "samples are int16; expected floats"),
        (np.zeros((100, 2)), 24000, r"shape \(100, 2\); expected \(samples,\) or \(channels, samples\)"),
        (np.zeros(100), 0, "sample rate is 0 Hz"),
    ],
)
def test_invalid_recording_is_rejected_with_its_reason(codec, waveform, rate_hz, message):
    with pytest.raises(BadInput, match=message):
        codec.encode(waveform, rate_hz)


@pytest.mark.parametrize("name", ["rvq_24khz", "rvq_16khz"])
@pytest.mark.parametrize("num_samples", [9600, 30719, 40001])
def test_acoustic_latents_do_not_depend_on_windows(load, monkeypatch, name, num_samples):
    codec = load(name)
    samples = torch.from_numpy(golden.recording(num_samples))[None]
    with torch.inference_mode():
        expected = acoustic.encode_acoustic(codec.acoustic_encoder, samples, codec.hop_samples)
        monkeypatch.setattr(acoustic, "ENCODER_WINDOW_SAMPLES", 7 * codec.hop_samples)
        windowed = acoustic.encode_acoustic(codec.acoustic_encoder, samples, codec.hop_samples)
    torch.testing.assert_close(windowed, expected, atol=1e-6, rtol=0)


@pytest.fixture
def local_codec(codec):
    """The codec with a semantic model without attention and normalization, so that its context is short."""
    codec = copy.deepcopy(codec)
    for layer in codec.semantic_model.encoder.layers:
        torch.nn.init.zeros_(layer.attention.out_proj.weight)
    codec.semantic_model.feature_extractor.conv_layers[0].layer_norm = torch.nn.Identity()
    return codec


@pytest.mark.parametrize("extra", [0, 1, 479, 700, 959])
def test_windows_of_long_recordings_join_seamlessly(local_codec, monkeypatch, extra):
    samples = golden.recording(13 * local_codec.sample_rate + extra)
    expected = local_codec.encode(samples, local_codec.sample_rate)
    for name, value in (("ENCODER_WINDOW_S", 5), ("ENCODER_CONTEXT_S", 1), ("CROSSFADE_S", 1)):
        monkeypatch.setattr(network, name, value)
    windowed = local_codec.encode(samples, local_codec.sample_rate)
    assert torch.equal(windowed, expected)


def test_semantic_model_input_is_bounded_for_long_recordings(codec, monkeypatch):
    """However long the recording, the semantic model's input is at most a window: here 8 s of 40."""
    for name, value in (("ENCODER_WINDOW_S", 8), ("ENCODER_CONTEXT_S", 1)):
        monkeypatch.setattr(network, name, value)
    lengths = []
    hook = codec.semantic_model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[-1]))
    codes = codec.encode(golden.recording(40 * codec.sample_rate), codec.sample_rate)
    hook.remove()
    assert codes.shape == (8, 1000)
    assert len(lengths) > 5
    assert max(lengths) <= 8 * 16000 + 320


def test_recording_read_from_a_file_is_encoded(codec, tmp_path):
    import soundfile

    soundfile.write(tmp_path / "a.wav", golden.recording(9600), codec.sample_rate, subtype="FLOAT")
    recording = read_recording(tmp_path / "a.wav")
    codes = codec.encode(recording.samples, recording.sample_rate_hz)
    assert torch.equal(codes, codec.encode(golden.recording(9600), codec.sample_rate))
