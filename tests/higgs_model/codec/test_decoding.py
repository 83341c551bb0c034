"""Batched and streaming decoding equal single-pass decoding; the receptive field is exact."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_model import HiggsAudioCodec
from higgs_model.codec import HiggsAudioCodecConfig, StreamingDecoder
from higgs_model.codec import codec as codec_module
from higgs_model.codec.acoustic import run_decoder
from higgs_model.codec.batching import BatchShape, plan_batches
from higgs_model.codec.receptive_field import ReceptiveField, split_windows
from higgs_model.codec.semantic import HubertModel
from higgs_model.errors import BadInput

TOLERANCE = 1e-4


def random_codes(codec, num_frames, seed):
    return torch.from_numpy(
        np.random.RandomState(seed).randint(0, codec.codebook_size, (codec.num_codebooks, num_frames))
    )


def decode_in_one_pass(codec, codes):
    """Decode all frames in a single pass, without windows or tiles."""
    with torch.inference_mode():
        latents = codec.fc2(codec.quantizer.decode(codes[None])).transpose(1, 2)
        return run_decoder(codec.acoustic_decoder, latents)[0]


@settings(max_examples=12, deadline=None)
@given(
    num_frames=st.integers(1, 180), sizes=st.lists(st.integers(0, 120), min_size=1, max_size=6), seed=st.integers(0, 99)
)
@pytest.mark.parametrize("name", ["rvq_24khz", "rvq_16khz", "rfsq_24khz"])
def test_stream_equals_single_pass(load, name, num_frames, sizes, seed):
    codec = load(name)
    codes = random_codes(codec, num_frames, seed)
    stream, parts, num_pushed, num_calls = StreamingDecoder(codec), [], 0, 0
    while num_pushed < num_frames:
        size = max(sizes[num_calls % len(sizes)], 0 if any(sizes) else 1)
        parts.append(stream.push(codes[:, num_pushed : num_pushed + size]))
        num_pushed, num_calls = num_pushed + size, num_calls + 1
        final = max(min(num_pushed, num_frames) - stream.lookahead_frames, 0)
        emitted = sum(len(part) for part in parts)
        assert final * codec.hop_samples <= emitted < (final + 1) * codec.hop_samples
    parts.append(stream.finish())
    torch.testing.assert_close(torch.cat(parts), decode_in_one_pass(codec, codes), atol=TOLERANCE, rtol=0)


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 180), min_size=1, max_size=5), seed=st.integers(0, 99))
@pytest.mark.parametrize("name", ["rvq_24khz", "rvq_16khz", "wavlm_avg_24khz"])
def test_batch_equals_single_clips(load, name, lengths, seed):
    codec = load(name)
    clips = [random_codes(codec, num_frames, seed + index) for index, num_frames in enumerate(lengths)]
    for codes, wave in zip(clips, codec.decode_batch(clips), strict=True):
        assert wave.shape == (codes.shape[1] * codec.hop_samples,)
        torch.testing.assert_close(wave, decode_in_one_pass(codec, codes), atol=TOLERANCE, rtol=0)


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=6),
    window=st.integers(1, 40),
    multiple=st.integers(1, 70),
)
def test_windows_padded_to_one_shape_are_exact(load, lengths, window, multiple):
    codec = load("rvq_24khz")
    shape = BatchShape(window, 4 * (window + 20), multiple)
    clips = [random_codes(codec, num_frames, index) for index, num_frames in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_batch_shape", lambda: shape)
        patch.setattr(codec, "_compiled_decoder", run_decoder)
        waves = codec.decode_batch(clips)
    for codes, wave in zip(clips, waves, strict=True):
        torch.testing.assert_close(wave, decode_in_one_pass(codec, codes), atol=TOLERANCE, rtol=0)


def test_zero_padding_alone_would_change_a_clip(codec):
    """Naive zero-padding of a batch changes its clips, which is why windows and masks are needed."""
    codes = random_codes(codec, 30, 0)
    padded = torch.cat([codes, torch.zeros(codec.num_codebooks, 20, dtype=torch.int64)], dim=1)
    decoded = decode_in_one_pass(codec, padded)[: 30 * codec.hop_samples]
    assert (decoded - decode_in_one_pass(codec, codes)).abs().max() > TOLERANCE


@pytest.mark.parametrize("ratios", [(8, 5, 4, 2, 3), (3, 2, 4, 5, 8), (8, 5, 4, 2)])
def test_receptive_field_is_exact(ratios):
    torch.manual_seed(0)
    semantic = HubertModel.config_class(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_conv_pos_embedding_groups=2,
    )
    config = HiggsAudioCodecConfig(
        sample_rate_hz=16000 if len(ratios) == 4 else 24000,
        ratios=ratios,
        encoder_channels=2,
        decoder_channels=32,
        acoustic_dim=8,
        semantic=semantic,
    )
    codec = HiggsAudioCodec(config).eval()
    decoder, hop, middle = codec.acoustic_decoder.double(), codec.hop_samples, 40
    for parameter in decoder.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 0.3)
    latents = torch.randn(1, 8, 81, dtype=torch.float64)
    changed = latents.clone()
    changed[..., middle] += 1
    with torch.inference_mode():
        affected = (run_decoder(decoder, latents) != run_decoder(decoder, changed))[0].nonzero().flatten()
    assert middle - int(affected[0]) // hop == codec.receptive_field.after
    assert int(affected[-1]) // hop - middle == codec.receptive_field.before


@given(num_frames=st.integers(0, 400), window=st.integers(8, 60), before=st.integers(0, 4), after=st.integers(0, 3))
def test_windows_tile_a_clip_with_context(num_frames, window, before, after):
    windows = split_windows(num_frames, window, ReceptiveField(before, after))
    assert [frame for w in windows for frame in range(w.keep_start, w.keep_stop)] == list(range(num_frames))
    for w in windows:
        assert w.keep_start - w.start >= before or w.start == 0
        assert w.stop - w.keep_stop >= after or w.stop == num_frames
        assert w.length == min(window, num_frames)


@given(lengths=st.lists(st.integers(0, 300), max_size=8))
def test_planned_batches_cover_every_frame_once(lengths):
    covered = []
    for batch in plan_batches(lengths, ReceptiveField(3, 2), BatchShape(20, 100, 8)):
        assert len(batch.rows) * batch.length <= 100
        for clip, window in batch.rows:
            assert window.length <= batch.length
            covered += [(clip, frame) for frame in range(window.keep_start, window.keep_stop)]
    assert sorted(covered) == [(clip, frame) for clip, length in enumerate(lengths) for frame in range(length)]


def test_fewer_codebooks_and_empty_clips_decode(codec):
    codes = random_codes(codec, 7, 0)
    coarse, full, none = codec.decode_batch([codes[:3], codes, codes[:, :0]])
    torch.testing.assert_close(coarse, codec.decode(codes[:3]))
    assert coarse.shape == full.shape
    assert not torch.equal(coarse, full)
    assert none.shape == (0,)


def test_stream_reports_its_lookahead_and_rejects_frames_after_the_end(codec):
    stream = StreamingDecoder(codec)
    assert stream.lookahead_frames == codec.receptive_field.after == 10
    assert stream.lookahead_s == pytest.approx(0.4)
    assert stream.finish().shape == (0,)
    with pytest.raises(BadInput, match="after the end"):
        stream.push(random_codes(codec, 1, 0))


def test_stream_buffers_only_its_context(codec):
    """However long the clip, a stage buffers no more than the receptive field of its own convolutions."""
    stream = StreamingDecoder(codec)
    for _ in range(40):
        stream.push(random_codes(codec, 25, 0))
    for stage in stream._stream._streams:
        assert len(stage._buffer_TC) <= stage.stage.receptive_field.before + stage.stage.receptive_field.after + 1
        assert stage._buffer_TC.untyped_storage().nbytes() == stage._buffer_TC.nbytes


def test_long_clip_decoded_in_portions_is_unchanged(codec, monkeypatch):
    codes = random_codes(codec, 120, 1)
    monkeypatch.setattr(codec_module, "_PORTION_FRAMES", 7)
    torch.testing.assert_close(codec.decode(codes), decode_in_one_pass(codec, codes), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(8, dtype=torch.int64), r"shape \(8,\)"),
        (torch.zeros(9, 3, dtype=torch.int64), "1 to 8 codebooks"),
        (torch.zeros(8, 3), "expected integers"),
        (torch.full((8, 3), 128), "range from 128 to 128; expected 0 to 127"),
        (np.full((8, 3), -1), "from -1 to -1"),
    ],
)
def test_invalid_codes_are_rejected_with_their_reason(codec, codes, message):
    with pytest.raises(BadInput, match=message):
        codec.decode(codes)


def test_bfloat16_is_close_to_float32(load, tmp_path):
    codec = load("rvq_24khz")
    codec.save_pretrained(tmp_path)
    half = HiggsAudioCodec.from_pretrained(tmp_path, dtype=torch.bfloat16)
    codes = random_codes(codec, 60, 0)
    decoded, expected = half.decode(codes), codec.decode(codes)
    assert decoded.dtype == torch.float32
    assert (decoded - expected).norm() < 0.05 * expected.norm()
    assert half.encode(decoded, codec.sample_rate).shape == codes.shape
