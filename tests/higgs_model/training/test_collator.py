"""Collated batches contain all inputs, and their labels are exactly the training targets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from higgs_model import HiggsAudioConfig, HiggsAudioModel, tokens
from higgs_model.delay import from_stream, undo_delay_pattern
from higgs_model.model.loss import next_labels
from higgs_model.training.collator import MEL_HOP_SAMPLES, Collator, Example, PositionCounter
from higgs_model.training.store import SAMPLE_RATE_HZ, PreparedAudio
from tests import builders
from tests.builders import BOS, EOS, IN, OUT, SIZE, K

IGNORE = tokens.IGNORE_INDEX
WINDOW = builders.MEL_FRAMES * MEL_HOP_SAMPLES
VARIANTS = {
    "codes": {},
    "no delay": {"use_delay_pattern": False},
    "tower": {"skip_audio_tower": False, "encode_audio_in_tokens": False},
    "tower and codes": {"skip_audio_tower": False},
}


@st.composite
def examples(draw, variant):
    """Examples of text, of output clips that are targets or not, and of input recordings, of three tokens each."""
    config = builders.config(**VARIANTS[variant])
    seed = draw(st.integers(0, 2**32))
    generator = np.random.default_rng(seed)
    ids, loss_mask, recordings = [1], [False], []
    for kind in draw(st.lists(st.sampled_from(["text", "answer", "out", "target", "in"]), min_size=1, max_size=6)):
        if kind in ("text", "answer"):
            count = draw(st.integers(1, 5))
            ids += generator.integers(2, 100, count).tolist()
            loss_mask += [kind == "answer"] * count
            continue
        frames = draw(st.integers(1, 12))
        codes = generator.integers(0, SIZE, (K, frames)).astype(np.int16)
        is_in = kind == "in"
        ids += [builders.OUT_BOS, IN if is_in else OUT, builders.AUDIO_EOS]
        loss_mask += [kind == "target"] * 3
        samples = None
        if is_in and not config.skip_audio_tower:
            samples = generator.integers(-3000, 3000, draw(st.integers(1, 3 * WINDOW))).astype(np.int16)
        recordings.append(PreparedAudio(codes if not is_in or config.encode_audio_in_tokens else None, samples))
    return Example(np.array(ids, np.int32), np.array(loss_mask), tuple(recordings))


def split(concatenated, starts):
    return concatenated.tensor_split(starts[1:].tolist(), dim=1) if len(starts) else []


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25)
@given(data=st.data())
def test_batch_contains_all_tokens_clips_and_recordings(variant, data):
    config = builders.config(**VARIANTS[variant])
    rows = data.draw(st.lists(st.lists(examples(variant), min_size=1, max_size=2), min_size=1, max_size=3))
    batch = Collator(config)(rows)
    outputs = [audio for row in rows for example in row for audio in _of_kind(example, OUT)]
    inputs = [audio for row in rows for example in row for audio in _of_kind(example, IN)]

    streams = split(batch.audio_out_ids, batch.audio_out_ids_start)
    assert len(streams) == len(outputs)
    for stream, audio in zip(streams, outputs, strict=True):
        assert np.array_equal(from_stream(stream, SIZE, config.use_delay_pattern), audio.codes_KT)
    if config.encode_audio_in_tokens:
        windows = [
            from_stream(s, SIZE, config.use_delay_pattern) for s in split(batch.audio_in_ids, batch.audio_in_ids_start)
        ]
        all_codes = np.concatenate([np.empty((K, 0)), *(audio.codes_KT for audio in inputs)], axis=1)
        assert np.array_equal(torch.cat([torch.empty(K, 0), *windows], dim=1), all_codes)
    if config.skip_audio_tower:
        assert batch.audio_features is None
    else:
        lengths = batch.audio_feature_attention_mask.sum(dim=1).tolist()
        expected = [
            -(-len(window) // MEL_HOP_SAMPLES) for audio in inputs for window in _split_windows(audio.samples_N)
        ]
        assert lengths == expected
        assert len(batch.audio_features) == int((batch.input_ids == IN).sum())

    # No token is lost, and only padding is masked.
    for row, ids, mask in zip(rows, batch.input_ids, batch.attention_mask, strict=True):
        expected = [token for example in row for token in _repeat_placeholders(example)]
        assert ids[mask.bool()].tolist() == expected
        assert mask.tolist() == [1] * len(expected) + [0] * (len(mask) - len(expected))


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25)
@given(data=st.data())
def test_labels_are_exactly_the_targets(variant, data):
    config = builders.config(**VARIANTS[variant])
    rows = data.draw(st.lists(st.lists(examples(variant), min_size=1, max_size=2), min_size=1, max_size=3))
    batch = Collator(config)(rows)
    for row, ids, labels in zip(rows, batch.input_ids, batch.label_ids, strict=True):
        expected = []
        for example in row:
            example_ids, loss_mask = example.ids.tolist(), example.loss_mask.tolist()
            expected += [
                token
                for index, (token, is_target) in enumerate(zip(example_ids, loss_mask, strict=True))
                if is_target and token != OUT and (index == 0 or example_ids[index - 1] != OUT)
            ]
        has_label = labels != IGNORE
        assert ids[has_label].tolist() == labels[has_label].tolist() == expected
    outputs = [(audio, flag) for row in rows for example in row for audio, flag in _output_clips(example)]
    clips = split(batch.label_audio_ids, batch.audio_out_ids_start)
    for labels, (audio, is_target) in zip(clips, outputs, strict=True):
        if not is_target:
            assert (labels == IGNORE).all()
            continue
        aligned = undo_delay_pattern(labels) if config.use_delay_pattern else labels
        assert (aligned[:, 0] == IGNORE).all()
        assert np.array_equal(aligned[:, 1:-1], audio.codes_KT)
        assert (aligned[:, -1] == EOS).all()
        assert (labels != IGNORE).sum() == audio.codes_KT.size + K
    assert batch.num_labels == (batch.label_ids != IGNORE).sum()
    assert list(batch.num_code_labels) == (batch.label_audio_ids != IGNORE).sum(dim=1).tolist()
    # Every label follows a frame of the same clip, so none is lost by the shift to the predicting position.
    shifted = next_labels(batch.label_audio_ids, batch.audio_out_ids_start)
    assert list(batch.num_code_labels) == (shifted != IGNORE).sum(dim=1).tolist()
    assert BOS not in batch.label_audio_ids.unique()


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25)
@given(data=st.data())
def test_batch_length_matches_the_position_counter(variant, data):
    """The position counter, the collator and the model's own expansion agree."""
    config = builders.config(**VARIANTS[variant])
    rows = data.draw(st.lists(st.lists(examples(variant), min_size=1, max_size=2), min_size=1, max_size=2))
    batch = Collator(config)(rows)
    output = MODELS[variant](**batch.inputs())
    assert output.attention_mask.sum() == batch.indices.num_valid
    assert output.attention_mask.numel() <= batch.indices.num_positions
    counter = PositionCounter.from_config(config)
    total = 0
    for example in (example for row in rows for example in row):
        total += len(example.ids) - len(example.recordings)
        for audio, kind in zip(example.recordings, example.ids[np.isin(example.ids, (IN, OUT))], strict=True):
            frames = 0 if audio.codes_KT is None else audio.codes_KT.shape[1]
            samples = 0 if audio.samples_N is None else len(audio.samples_N)
            total += counter.output_positions(frames) if kind == OUT else counter.input_positions(frames, samples)
    assert total == batch.indices.num_valid


def test_mel_spectrograms_match_whisper():
    """At the published window length, a recording of 45 s becomes the spectrograms of two windows."""
    config = builders.config(skip_audio_tower=False, encode_audio_in_tokens=False)
    config.audio_encoder_config.max_source_positions, config.audio_encoder_config.num_mel_bins = 1500, 128
    wave = np.random.default_rng(0).integers(-9000, 9000, 45 * SAMPLE_RATE_HZ).astype(np.int16)
    ids, loss_mask = np.array([1, 2, IN, 3, 4], np.int32), np.zeros(5, bool)
    batch = Collator(config)([[Example(ids, loss_mask, (PreparedAudio(None, wave),))]])
    assert batch.input_ids.tolist() == [[1, 2, IN, 3, 2, IN, 3, 4]]
    windows = [wave[: 30 * SAMPLE_RATE_HZ] / 32767, wave[30 * SAMPLE_RATE_HZ :] / 32767]
    expected = WhisperFeatureExtractor(feature_size=128)(
        [window.astype(np.float32) for window in windows],
        sampling_rate=SAMPLE_RATE_HZ,
        return_attention_mask=True,
        return_tensors="pt",
    )
    torch.testing.assert_close(batch.audio_features, expected["input_features"])
    assert torch.equal(batch.audio_feature_attention_mask, expected["attention_mask"].long())


MODELS = {
    variant: HiggsAudioModel(HiggsAudioConfig(**builders.config(**VARIANTS[variant]).to_dict())).eval()
    for variant in VARIANTS
}


def _of_kind(example, kind):
    placeholders = example.ids[np.isin(example.ids, (IN, OUT))]
    return [audio for audio, token in zip(example.recordings, placeholders, strict=True) if token == kind]


def _output_clips(example):
    flags = example.loss_mask[example.ids == OUT]
    return list(zip(_of_kind(example, OUT), flags, strict=True))


def _split_windows(samples):
    return [samples[start : start + WINDOW] for start in range(0, len(samples), WINDOW)]


def _repeat_placeholders(example):
    """Return an example's tokens, with the three around an input recording repeated for each window."""
    ids, inputs = example.ids.tolist(), iter(_of_kind(example, IN))
    result, index = [], 0
    while index < len(ids):
        if index + 1 < len(ids) and ids[index + 1] == IN:
            samples = next(inputs).samples_N
            result += ids[index : index + 3] * (1 if samples is None else len(_split_windows(samples)))
            index += 3
        else:
            result.append(ids[index])
            index += 1
    return result
