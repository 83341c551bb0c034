"""Batches and streams give what single clips give; the reach of the decoder is what it is said to be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_model import HiggsAudioCodec
from higgs_model.codec import HiggsAudioCodecConfig, StreamingDecoder
from higgs_model.codec import codec as codec_room
from higgs_model.codec.acoustic import run_decoder
from higgs_model.codec.batching import BatchShape, plan
from higgs_model.codec.reach import Reach, cut
from higgs_model.codec.semantic import HubertModel
from higgs_model.errors import BadInput

TOLERANCE = 1e-4


def random_codes(codec, num_frames, seed):
    return torch.from_numpy(
        np.random.RandomState(seed).randint(0, codec.codebook_size, (codec.num_codebooks, num_frames))
    )


def whole(codec, codes):
    """All frames at once, without windows or tiles."""
    with torch.inference_mode():
        latents = codec.fc2(codec.quantizer.decode(codes[None])).transpose(1, 2)
        return run_decoder(codec.acoustic_decoder, latents)[0]


@settings(max_examples=12, deadline=None)
@given(
    num_frames=st.integers(1, 180), sizes=st.lists(st.integers(0, 120), min_size=1, max_size=6), seed=st.integers(0, 99)
)
@pytest.mark.parametrize("name", ["rvq_24khz", "rvq_16khz", "rfsq_24khz"])
def test_a_stream_is_the_whole(load, name, num_frames, sizes, seed):
    codec = load(name)
    codes = random_codes(codec, num_frames, seed)
    stream, pieces, taken, turn = StreamingDecoder(codec), [], 0, 0
    while taken < num_frames:
        size = max(sizes[turn % len(sizes)], 0 if any(sizes) else 1)
        pieces.append(stream.push(codes[:, taken : taken + size]))
        taken, turn = taken + size, turn + 1
        final = max(min(taken, num_frames) - stream.lookahead_frames, 0)
        emitted = sum(len(piece) for piece in pieces)
        assert final * codec.hop_samples <= emitted < (final + 1) * codec.hop_samples
    pieces.append(stream.finish())
    torch.testing.assert_close(torch.cat(pieces), whole(codec, codes), atol=TOLERANCE, rtol=0)


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 180), min_size=1, max_size=5), seed=st.integers(0, 99))
@pytest.mark.parametrize("name", ["rvq_24khz", "rvq_16khz", "wavlm_avg_24khz"])
def test_a_batch_is_its_clips_one_by_one(load, name, lengths, seed):
    codec = load(name)
    clips = [random_codes(codec, num_frames, seed + index) for index, num_frames in enumerate(lengths)]
    for codes, wave in zip(clips, codec.decode_batch(clips), strict=True):
        assert wave.shape == (codes.shape[1] * codec.hop_samples,)
        torch.testing.assert_close(wave, whole(codec, codes), atol=TOLERANCE, rtol=0)


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=6),
    window=st.integers(1, 40),
    multiple=st.integers(1, 70),
)
def test_windows_filled_up_to_one_shape_are_exact(load, lengths, window, multiple):
    codec = load("rvq_24khz")
    shape = BatchShape(window, 4 * (window + 20), multiple)
    clips = [random_codes(codec, num_frames, index) for index, num_frames in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_batch_shape", lambda: shape)
        patch.setattr(codec, "_compiled_decoder", run_decoder)
        waves = codec.decode_batch(clips)
    for codes, wave in zip(clips, waves, strict=True):
        torch.testing.assert_close(wave, whole(codec, codes), atol=TOLERANCE, rtol=0)


def test_zeros_after_a_clip_would_leak(codec):
    """What all of this is for: the naive batch is wrong."""
    codes = random_codes(codec, 30, 0)
    padded = torch.cat([codes, torch.zeros(codec.num_codebooks, 20, dtype=torch.int64)], dim=1)
    found = whole(codec, padded)[: 30 * codec.hop_samples]
    assert (found - whole(codec, codes)).abs().max() > TOLERANCE


@pytest.mark.parametrize("ratios", [(8, 5, 4, 2, 3), (3, 2, 4, 5, 8), (8, 5, 4, 2)])
def test_the_reach_is_exactly_as_far_as_a_change_is_heard(ratios):
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
        heard = (run_decoder(decoder, latents) != run_decoder(decoder, changed))[0].nonzero().flatten()
    assert middle - int(heard[0]) // hop == codec.reach.after
    assert int(heard[-1]) // hop - middle == codec.reach.before


@given(num_frames=st.integers(0, 400), window=st.integers(8, 60), before=st.integers(0, 4), after=st.integers(0, 3))
def test_windows_tile_a_clip_with_context(num_frames, window, before, after):
    windows = cut(num_frames, window, Reach(before, after))
    assert [frame for one in windows for frame in range(one.keep_start, one.keep_stop)] == list(range(num_frames))
    for one in windows:
        assert one.keep_start - one.start >= before or one.start == 0
        assert one.stop - one.keep_stop >= after or one.stop == num_frames
        assert one.length == min(window, num_frames)


@given(lengths=st.lists(st.integers(0, 300), max_size=8))
def test_a_plan_has_every_frame_once(lengths):
    seen = []
    for batch in plan(lengths, Reach(3, 2), BatchShape(20, 100, 8)):
        assert len(batch.rows) * batch.length <= 100
        for clip, window in batch.rows:
            assert window.length <= batch.length
            seen += [(clip, frame) for frame in range(window.keep_start, window.keep_stop)]
    assert sorted(seen) == [(clip, frame) for clip, length in enumerate(lengths) for frame in range(length)]


def test_fewer_codebooks_and_no_frames_decode(codec):
    codes = random_codes(codec, 7, 0)
    coarse, full, none = codec.decode_batch([codes[:3], codes, codes[:, :0]])
    torch.testing.assert_close(coarse, codec.decode(codes[:3]))
    assert coarse.shape == full.shape
    assert not torch.equal(coarse, full)
    assert none.shape == (0,)


def test_the_stream_says_its_lookahead_and_refuses_what_comes_after(codec):
    stream = StreamingDecoder(codec)
    assert stream.lookahead_frames == codec.reach.after == 10
    assert stream.lookahead_s == pytest.approx(0.4)
    assert stream.finish().shape == (0,)
    with pytest.raises(BadInput, match="after the end"):
        stream.push(random_codes(codec, 1, 0))


def test_a_stream_holds_no_more_than_its_context(codec):
    """However long the clip, what lies between two pushes is the reach of each stage's own convolutions."""
    stream = StreamingDecoder(codec)
    for _ in range(40):
        stream.push(random_codes(codec, 25, 0))
    for stage in stream._stream._streams:
        assert len(stage._held_TC) <= stage.stage.reach.before + stage.stage.reach.after + 1
        assert stage._held_TC.untyped_storage().nbytes() == stage._held_TC.nbytes


def test_a_long_clip_is_the_same_in_portions(codec, monkeypatch):
    codes = random_codes(codec, 120, 1)
    monkeypatch.setattr(codec_room, "_PORTION_FRAMES", 7)
    torch.testing.assert_close(codec.decode(codes), whole(codec, codes), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(8, dtype=torch.int64), r"shape \(8,\)"),
        (torch.zeros(9, 3, dtype=torch.int64), "1 to 8 codebooks"),
        (torch.zeros(8, 3), "wanted integers"),
        (torch.full((8, 3), 128), "from 128 to 128; wanted 0 to 127"),
        (np.full((8, 3), -1), "from -1 to -1"),
    ],
)
def test_bad_codes_are_refused_in_a_sentence(codec, codes, message):
    with pytest.raises(BadInput, match=message):
        codec.decode(codes)


def test_bfloat16_is_near_float32(load, tmp_path):
    codec = load("rvq_24khz")
    codec.save_pretrained(tmp_path)
    half = HiggsAudioCodec.from_pretrained(tmp_path, dtype=torch.bfloat16)
    codes = random_codes(codec, 60, 0)
    found, wanted = half.decode(codes), codec.decode(codes)
    assert found.dtype == torch.float32
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    assert half.encode(found, codec.sample_rate).shape == codes.shape
