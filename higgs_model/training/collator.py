"""Samples to batches that the network takes.

    sample      a b <audio_out_bos> X <audio_eos> <eot>        X stands for a clip's codes
    label       − − <audio_out_bos> − −           <eot>        and for X: the codes, the EOS column too

A label is what the model has to say itself where it stands. Inside a clip that is a code of each codebook, delayed as
the clip is; BOS, and what the delay fills up, is forced and so no label. `<|audio_eos|>` follows a clip by rule, never
drawn from the text head, so it is none either. Recordings for the audio tower are cut into pieces of its length, and
the three tokens around a placeholder are repeated for each. Nothing is cut off: `batches` lets nothing in that is too
long.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import WhisperFeatureExtractor

from higgs_model import tokens
from higgs_model.config import HiggsAudioConfig
from higgs_model.delay import apply_delay_pattern, to_stream
from higgs_model.model.loss import next_labels
from higgs_model.model.merge import TRAINING_ROUND_TO, expand
from higgs_model.training.batch import Batch, Places
from higgs_model.training.store import SAMPLE_RATE_HZ, Heard

MEL_HOP_SAMPLES = 160
"""Of Whisper's spectrogram: 100 mel frames a second."""
_FULL_SCALE = 32767.0


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence: ids (S,) with a placeholder a recording, which of them are learnt, and the recordings in order."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    recordings: tuple[Heard, ...]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many positions recordings take in one network; the arithmetic of what the collator makes.

    Attributes:
        stream_extra: of a clip's codes, beyond its frames.
        piece_samples: of the audio tower; None without one.
        in_codes: whether what is heard goes in as codes, too.
    """

    stream_extra: int
    piece_samples: int | None
    in_codes: bool

    @classmethod
    def of(cls, config: HiggsAudioConfig) -> Sizes:
        """Those of a network."""
        delay = config.audio_num_codebooks - 1 if config.use_delay_pattern else 0
        piece = None if config.skip_audio_tower else config.audio_encoder_config.num_mel_frames * MEL_HOP_SAMPLES
        return cls(2 + delay, piece, bool(config.encode_audio_in_tokens))

    def out(self, num_frames: int) -> int:
        """Of a clip that the model says."""
        return num_frames + self.stream_extra

    def heard(self, num_frames: int, num_samples: int) -> int:
        """Of a recording that it hears, in place of its placeholder; with the tokens around further pieces."""
        pieces = self.pieces(num_samples)
        total = 2 * (len(pieces) - 1)
        if self.in_codes:
            total += num_frames + len(pieces) * self.stream_extra
        if self.piece_samples is not None:
            total += sum(_features(stop - start) for start, stop in pieces)
        return total

    def pieces(self, num_samples: int) -> list[tuple[int, int]]:
        """From where to where each piece reaches, in samples."""
        if self.piece_samples is None or num_samples <= self.piece_samples:
            return [(0, num_samples)]
        return [
            (start, min(start + self.piece_samples, num_samples)) for start in range(0, num_samples, self.piece_samples)
        ]


def _features(num_samples: int) -> int:
    """Features that the audio tower gives for a piece: half of half of its mel frames, each rounded as it does."""
    num_positions = (-(-num_samples // MEL_HOP_SAMPLES) - 1) // 2 + 1
    return (num_positions - 2) // 2 + 1


class Collator:
    """Makes batches for one network."""

    def __init__(self, config: HiggsAudioConfig) -> None:
        self._config = config
        self._sizes = Sizes.of(config)
        # The configuration has made sure of them.
        self._bos, self._eos = cast(int, config.audio_stream_bos_id), cast(int, config.audio_stream_eos_id)

    def __call__(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """A batch of rows, each of one sample or of several that are packed."""
        made = [[_Sequence.of(self, example) for example in row] for row in rows]
        parts = [part for row in made for part in row]
        ids = [np.concatenate([part.ids for part in row]) for row in made]
        numbers = [np.repeat(np.arange(len(row)), [len(part.ids) for part in row]) for row in made]
        outs = [clip for part in parts for clip in part.outs]
        labels = [clip for part in parts for clip in part.out_labels]
        label_ids = self._padded([np.concatenate([part.labels for part in row]) for row in made], tokens.IGNORE_INDEX)
        label_audio_ids = self._joined(labels)
        in_codes = [clip for part in parts for clip in part.in_codes]
        pieces = [piece for part in parts for piece in part.pieces]
        features, mask = self._features(pieces)
        input_ids = self._padded(ids, self._config.pad_token_id or 0)
        attention_mask = self._padded([np.ones(len(row), np.int64) for row in ids], 0)
        num_features = torch.tensor([_features(len(piece)) for piece in pieces], dtype=torch.int64)
        expansion = expand(
            self._config,
            input_ids,
            attention_mask,
            label_ids,
            self._padded(numbers, 0) if any(len(row) > 1 for row in made) else None,
            num_features=num_features if pieces else 0,
            num_codes=_lengths(in_codes) if in_codes else 0,
            num_frames=_lengths(outs),
            left_padding=False,
            round_to=TRAINING_ROUND_TO,
        )
        most = self._config.audio_encoder_config.max_source_positions // 2
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            audio_features=features,
            audio_feature_attention_mask=mask,
            audio_in_ids=self._joined(in_codes) if self._sizes.in_codes else None,
            audio_in_ids_start=_start(in_codes) if self._sizes.in_codes else None,
            audio_out_ids=self._joined(outs),
            audio_out_ids_start=_start(outs),
            label_ids=label_ids,
            label_audio_ids=label_audio_ids,
            places=Places.of(expansion, num_features, most, next_labels(label_audio_ids, _start(outs))),
            num_labels=int((label_ids != tokens.IGNORE_INDEX).sum()),
            num_code_labels=tuple((label_audio_ids != tokens.IGNORE_INDEX).sum(dim=1).tolist()),
        )

    def stream(self, codes_KT: NDArray[np.int16]) -> Tensor:
        """A clip as the model sees it, (K, T + 2 + K − 1) int64 with the delay pattern."""
        codes = torch.from_numpy(codes_KT.astype(np.int64))
        return to_stream(codes, self._bos, self._eos, self._config.use_delay_pattern)

    def labels(self, codes_KT: NDArray[np.int16]) -> Tensor:
        """What of it the model has to say itself, of the same shape."""
        codes = torch.from_numpy(codes_KT.astype(np.int64))
        column = codes.new_ones(codes.shape[0], 1)
        framed = torch.cat([column * tokens.IGNORE_INDEX, codes, column * self._eos], dim=1)
        if not self._config.use_delay_pattern:
            return framed
        return apply_delay_pattern(framed, tokens.IGNORE_INDEX, tokens.IGNORE_INDEX)

    def _padded(self, rows: Sequence[NDArray[Any]], fill: int) -> Tensor:
        longest = max(len(row) for row in rows)
        padded = np.full((len(rows), longest), fill, np.int64)
        for at, row in enumerate(rows):
            padded[at, : len(row)] = row
        return torch.from_numpy(padded)

    def _joined(self, clips: Sequence[Tensor]) -> Tensor:
        nothing = torch.empty(self._config.audio_num_codebooks, 0, dtype=torch.int64)
        return torch.cat([nothing, *clips], dim=1)

    def _features(self, pieces: Sequence[NDArray[np.int16]]) -> tuple[Tensor | None, Tensor | None]:
        """Whisper's mels (pieces, mel bins, mel frames) of the tower's length, and where they are real."""
        if self._sizes.piece_samples is None:
            return None, None
        bins = self._config.audio_encoder_config.num_mel_bins
        num_frames = self._sizes.piece_samples // MEL_HOP_SAMPLES
        lengths = torch.tensor([-(-len(piece) // MEL_HOP_SAMPLES) for piece in pieces], dtype=torch.int64)
        mask = torch.arange(num_frames) < lengths.unsqueeze(1)
        if not pieces:
            return torch.empty(0, bins, num_frames), mask.long()
        waves = np.zeros((len(pieces), self._sizes.piece_samples), np.float32)
        for at, piece in enumerate(pieces):
            waves[at, : len(piece)] = piece / _FULL_SCALE
        made = _extractor(bins)(
            list(waves), sampling_rate=SAMPLE_RATE_HZ, padding=False, truncation=False, return_tensors="pt"
        )
        return made["input_features"], mask.long()


@functools.lru_cache(maxsize=4)
def _extractor(mel_bins: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=mel_bins, sampling_rate=SAMPLE_RATE_HZ, hop_length=MEL_HOP_SAMPLES)


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """One sample, its recordings in pieces and its clips delayed."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    outs: list[Tensor]
    out_labels: list[Tensor]
    in_codes: list[Tensor]
    pieces: list[NDArray[np.int16]]

    @classmethod
    def of(cls, collator: Collator, example: Example) -> _Sequence:
        config, sizes = collator._config, collator._sizes
        in_id, out_id = config.audio_in_token_idx, config.audio_out_token_idx
        ids = example.ids.astype(np.int64)
        labels = np.where(example.trained, ids, tokens.IGNORE_INDEX)
        places = np.flatnonzero((ids == in_id) | (ids == out_id))
        outs, out_labels, in_codes, pieces = list[Tensor](), list[Tensor](), list[Tensor](), list[NDArray[np.int16]]()
        repeats = np.ones(len(ids), np.int64)
        for place, heard in zip(places.tolist(), example.recordings, strict=True):
            num_frames = 0 if heard.codes_KT is None else heard.codes_KT.shape[1]
            num_samples = 0 if heard.samples_N is None else len(heard.samples_N)
            if ids[place] == out_id and heard.codes_KT is not None:
                outs.append(collator.stream(heard.codes_KT))
                learnt = collator.labels(heard.codes_KT)
                out_labels.append(learnt if example.trained[place] else torch.full_like(learnt, tokens.IGNORE_INDEX))
                labels[place : place + 2] = tokens.IGNORE_INDEX
                continue
            spans = sizes.pieces(num_samples)
            repeats[place] = len(spans)
            if heard.samples_N is not None:
                pieces += [heard.samples_N[start:stop] for start, stop in spans]
            if heard.codes_KT is not None:
                edges = [round(stop / num_samples * num_frames) for _, stop in spans[:-1]]
                in_codes += [collator.stream(part) for part in np.split(heard.codes_KT, edges, axis=1)]
        if (repeats > 1).any():
            order = _with_repeats(repeats)
            ids, labels = ids[order], labels[order]
        return cls(ids, labels, outs, out_labels, in_codes, pieces)


def _with_repeats(repeats: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of tokens, those of a placeholder and its two neighbours again for each further piece."""
    order: list[int] = []
    for at in range(len(repeats)):
        order.append(at)
        if at and repeats[at - 1] > 1:
            order += [at - 2, at - 1, at] * (int(repeats[at - 1]) - 1)
    return np.array(order)


def _lengths(clips: Sequence[Tensor]) -> Tensor:
    return torch.tensor([clip.shape[1] for clip in clips], dtype=torch.int64)


def _start(clips: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), _lengths(clips)]).cumsum(0)[:-1]
