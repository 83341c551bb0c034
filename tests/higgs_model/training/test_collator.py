"""Batches: whatever goes in comes out again, and labels are exactly what the model has to say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from higgs_model import HiggsAudioConfig, HiggsAudioModel, tokens
from higgs_model.delay import from_stream, undo_delay_pattern
from higgs_model.model.loss import next_labels
from higgs_model.training.collator import MEL_HOP_SAMPLES, Collator, Example, Sizes
from higgs_model.training.store import SAMPLE_RATE_HZ, Heard
from tests import builders
from tests.builders import BOS, EOS, IN, OUT, SIZE, K

IGNORE = tokens.IGNORE_INDEX
PIECE = builders.MEL_FRAMES * MEL_HOP_SAMPLES
WAYS = {
    "codes": {},
    "no delay": {"use_delay_pattern": False},
    "tower": {"skip_audio_tower": False, "encode_audio_in_tokens": False},
    "tower and codes": {"skip_audio_tower": False},
}


@st.composite
def examples(draw, way):
    """Sequences of text, of clips that are learnt or not, and of recordings that are heard, in three tokens each."""
    config = builders.config(**WAYS[way])
    seed = draw(st.integers(0, 2**32))
    generator = np.random.default_rng(seed)
    ids, trained, recordings = [1], [False], []
    for kind in draw(st.lists(st.sampled_from(["text", "answer", "out", "learnt", "in"]), min_size=1, max_size=6)):
        if kind in ("text", "answer"):
            count = draw(st.integers(1, 5))
            ids += generator.integers(2, 100, count).tolist()
            trained += [kind == "answer"] * count
            continue
        frames = draw(st.integers(1, 12))
        codes = generator.integers(0, SIZE, (K, frames)).astype(np.int16)
        is_in = kind == "in"
        ids += [builders.OUT_BOS, IN if is_in else OUT, builders.AUDIO_EOS]
        trained += [kind == "learnt"] * 3
        samples = None
        if is_in and not config.skip_audio_tower:
            samples = generator.integers(-3000, 3000, draw(st.integers(1, 3 * PIECE))).astype(np.int16)
        recordings.append(Heard(codes if not is_in or config.encode_audio_in_tokens else None, samples))
    return Example(np.array(ids, np.int32), np.array(trained), tuple(recordings))


def split(joined, starts):
    return joined.tensor_split(starts[1:].tolist(), dim=1) if len(starts) else []


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=25)
@given(data=st.data())
def test_what_goes_in_comes_out_again(way, data):
    config = builders.config(**WAYS[way])
    rows = data.draw(st.lists(st.lists(examples(way), min_size=1, max_size=2), min_size=1, max_size=3))
    batch = Collator(config)(rows)
    said = [heard for row in rows for one in row for heard in _of_kind(one, OUT)]
    heard = [heard for row in rows for one in row for heard in _of_kind(one, IN)]

    streams = split(batch.audio_out_ids, batch.audio_out_ids_start)
    assert len(streams) == len(said)
    for stream, one in zip(streams, said, strict=True):
        assert np.array_equal(from_stream(stream, SIZE, config.use_delay_pattern), one.codes_KT)
    if config.encode_audio_in_tokens:
        pieces = [
            from_stream(s, SIZE, config.use_delay_pattern) for s in split(batch.audio_in_ids, batch.audio_in_ids_start)
        ]
        whole = np.concatenate([np.empty((K, 0)), *(one.codes_KT for one in heard)], axis=1)
        assert np.array_equal(torch.cat([torch.empty(K, 0), *pieces], dim=1), whole)
    if config.skip_audio_tower:
        assert batch.audio_features is None
    else:
        lengths = batch.audio_feature_attention_mask.sum(dim=1).tolist()
        wanted = [-(-len(piece) // MEL_HOP_SAMPLES) for one in heard for piece in _cut(one.samples_N)]
        assert lengths == wanted
        assert len(batch.audio_features) == int((batch.input_ids == IN).sum())

    # No token is lost, and what is padding is masked.
    for row, ids, mask in zip(rows, batch.input_ids, batch.attention_mask, strict=True):
        wanted = [token for one in row for token in _with_pieces(one)]
        assert ids[mask.bool()].tolist() == wanted
        assert mask.tolist() == [1] * len(wanted) + [0] * (len(mask) - len(wanted))


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=25)
@given(data=st.data())
def test_labels_are_exactly_the_answers(way, data):
    config = builders.config(**WAYS[way])
    rows = data.draw(st.lists(st.lists(examples(way), min_size=1, max_size=2), min_size=1, max_size=3))
    batch = Collator(config)(rows)
    for row, ids, labels in zip(rows, batch.input_ids, batch.label_ids, strict=True):
        wanted = []
        for one in row:
            ids_of, trained = one.ids.tolist(), one.trained.tolist()
            wanted += [
                token
                for at, (token, is_trained) in enumerate(zip(ids_of, trained, strict=True))
                if is_trained and token != OUT and (at == 0 or ids_of[at - 1] != OUT)
            ]
        learnt = labels != IGNORE
        assert ids[learnt].tolist() == labels[learnt].tolist() == wanted
    said = [(heard, flag) for row in rows for one in row for heard, flag in _learnt_clips(one)]
    clips = split(batch.label_audio_ids, batch.audio_out_ids_start)
    for labels, (heard, is_learnt) in zip(clips, said, strict=True):
        if not is_learnt:
            assert (labels == IGNORE).all()
            continue
        framed = undo_delay_pattern(labels) if config.use_delay_pattern else labels
        assert (framed[:, 0] == IGNORE).all()
        assert np.array_equal(framed[:, 1:-1], heard.codes_KT)
        assert (framed[:, -1] == EOS).all()
        assert (labels != IGNORE).sum() == heard.codes_KT.size + K
    assert batch.num_labels == (batch.label_ids != IGNORE).sum()
    assert list(batch.num_code_labels) == (batch.label_audio_ids != IGNORE).sum(dim=1).tolist()
    # Each label stands where a frame of the same clip comes before it, so all of them are scored.
    scored = next_labels(batch.label_audio_ids, batch.audio_out_ids_start)
    assert list(batch.num_code_labels) == (scored != IGNORE).sum(dim=1).tolist()
    assert BOS not in batch.label_audio_ids.unique()


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=25)
@given(data=st.data())
def test_a_batch_is_as_long_as_was_reckoned(way, data):
    """The network's own expansion gives the positions that batches are cut by."""
    config = builders.config(**WAYS[way])
    rows = data.draw(st.lists(st.lists(examples(way), min_size=1, max_size=2), min_size=1, max_size=2))
    batch = Collator(config)(rows)
    output = MODELS[way](**batch.inputs())
    assert output.attention_mask.sum() == batch.places.num_real
    assert output.attention_mask.numel() <= batch.places.num_positions
    sizes = Sizes.of(config)
    reckoned = 0
    for one in (one for row in rows for one in row):
        reckoned += len(one.ids) - len(one.recordings)
        for heard, kind in zip(one.recordings, one.ids[np.isin(one.ids, (IN, OUT))], strict=True):
            frames = 0 if heard.codes_KT is None else heard.codes_KT.shape[1]
            samples = 0 if heard.samples_N is None else len(heard.samples_N)
            reckoned += sizes.out(frames) if kind == OUT else sizes.heard(frames, samples)
    assert reckoned == batch.places.num_real


def test_mels_are_whispers():
    """At the published length, those that transformers' extractor makes by itself of half a minute and less."""
    config = builders.config(skip_audio_tower=False, encode_audio_in_tokens=False)
    config.audio_encoder_config.max_source_positions, config.audio_encoder_config.num_mel_bins = 1500, 128
    wave = np.random.default_rng(0).integers(-9000, 9000, 45 * SAMPLE_RATE_HZ).astype(np.int16)
    ids, trained = np.array([1, 2, IN, 3, 4], np.int32), np.zeros(5, bool)
    batch = Collator(config)([[Example(ids, trained, (Heard(None, wave),))]])
    assert batch.input_ids.tolist() == [[1, 2, IN, 3, 2, IN, 3, 4]]
    pieces = [wave[: 30 * SAMPLE_RATE_HZ] / 32767, wave[30 * SAMPLE_RATE_HZ :] / 32767]
    theirs = WhisperFeatureExtractor(feature_size=128)(
        [piece.astype(np.float32) for piece in pieces],
        sampling_rate=SAMPLE_RATE_HZ,
        return_attention_mask=True,
        return_tensors="pt",
    )
    torch.testing.assert_close(batch.audio_features, theirs["input_features"])
    assert torch.equal(batch.audio_feature_attention_mask, theirs["attention_mask"].long())


MODELS = {way: HiggsAudioModel(HiggsAudioConfig(**builders.config(**WAYS[way]).to_dict())).eval() for way in WAYS}


def _of_kind(example, kind):
    kinds = example.ids[np.isin(example.ids, (IN, OUT))]
    return [heard for heard, one in zip(example.recordings, kinds, strict=True) if one == kind]


def _learnt_clips(example):
    flags = example.trained[example.ids == OUT]
    return list(zip(_of_kind(example, OUT), flags, strict=True))


def _cut(samples):
    return [samples[start : start + PIECE] for start in range(0, len(samples), PIECE)]


def _with_pieces(example):
    """Its tokens, the three around a recording once for each piece."""
    ids, heard = example.ids.tolist(), iter(_of_kind(example, IN))
    result, at = [], 0
    while at < len(ids):
        if at + 1 < len(ids) and ids[at + 1] == IN:
            samples = next(heard).samples_N
            result += ids[at : at + 3] * (1 if samples is None else len(_cut(samples)))
            at += 3
        else:
            result.append(ids[at])
            at += 1
    return result
