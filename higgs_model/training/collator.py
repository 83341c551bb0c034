"""Collation of examples into batches.

    example     a b <audio_out_bos> X <audio_eos> <eot>        X is the placeholder of a clip's codes
    label       − − <audio_out_bos> − −           <eot>        and for X: the codes, including the EOS column

Labels are the tokens that the model has to generate itself. Within a clip, these are the codes of each codebook with
the clip's delay pattern; BOS and the padding of the delay pattern are forced and have no label. `<|audio_eos|>` follows
every clip by rule and is never sampled from the text head, so it has no label either. Recordings for the audio tower
are split into windows of its length, and the three tokens around a placeholder are repeated for each window. Nothing is
truncated: `batch_sampler` excludes sequences that are too long.
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
from higgs_model.model.merge import TRAINING_ROUND_TO, expand_placeholders
from higgs_model.training.batch import Batch, BatchIndices
from higgs_model.training.store import SAMPLE_RATE_HZ, PreparedAudio

MEL_HOP_SAMPLES = 160
"""Hop of Whisper's spectrogram: 100 mel frames per second."""
_FULL_SCALE = 32767.0


@dataclasses.dataclass(frozen=True)
class Example:
    """A training sequence.

    Attributes:
        ids: (S,) with a placeholder per recording.
        loss_mask: (S,) whether each token is a label.
        recordings: the recordings of the placeholders, in order.
    """

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    recordings: tuple[PreparedAudio, ...]


@dataclasses.dataclass(frozen=True)
class PositionCounter:
    """Computes the number of expanded positions of recordings, consistently with the collator.

    Attributes:
        stream_extra: positions of a clip in addition to its frames.
        window_samples: window length of the audio tower; None without an audio tower.
        in_codes: whether input recordings are also represented as codes.
    """

    stream_extra: int
    window_samples: int | None
    in_codes: bool

    @classmethod
    def from_config(cls, config: HiggsAudioConfig) -> PositionCounter:
        """Return the counter of a network."""
        delay = config.audio_num_codebooks - 1 if config.use_delay_pattern else 0
        window = None if config.skip_audio_tower else config.audio_encoder_config.num_mel_frames * MEL_HOP_SAMPLES
        return cls(2 + delay, window, bool(config.encode_audio_in_tokens))

    def output_positions(self, num_frames: int) -> int:
        """Return the positions of an output clip."""
        return num_frames + self.stream_extra

    def input_positions(self, num_frames: int, num_samples: int) -> int:
        """Return the positions of an input recording, including the repeated tokens around its further windows."""
        windows = self.windows(num_samples)
        total = 2 * (len(windows) - 1)
        if self.in_codes:
            total += num_frames + len(windows) * self.stream_extra
        if self.window_samples is not None:
            total += sum(_num_features(stop - start) for start, stop in windows)
        return total

    def windows(self, num_samples: int) -> list[tuple[int, int]]:
        """Return the (start, stop) samples of each window."""
        if self.window_samples is None or num_samples <= self.window_samples:
            return [(0, num_samples)]
        return [
            (start, min(start + self.window_samples, num_samples))
            for start in range(0, num_samples, self.window_samples)
        ]


def _num_features(num_samples: int) -> int:
    """Return the audio tower's features of a window: its mel frames halved twice, with the tower's rounding."""
    num_positions = (-(-num_samples // MEL_HOP_SAMPLES) - 1) // 2 + 1
    return (num_positions - 2) // 2 + 1


class Collator:
    """Collates examples for one network."""

    def __init__(self, config: HiggsAudioConfig) -> None:
        self._config = config
        self._counter = PositionCounter.from_config(config)
        # Validated by the configuration.
        self._bos, self._eos = cast(int, config.audio_stream_bos_id), cast(int, config.audio_stream_eos_id)

    def __call__(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """Collate rows of a single or several packed examples."""
        rows_of_sequences = [[_Sequence.from_example(self, example) for example in row] for row in rows]
        sequences = [sequence for row in rows_of_sequences for sequence in row]
        ids = [np.concatenate([part.ids for part in row]) for row in rows_of_sequences]
        sample_ids = [np.repeat(np.arange(len(row)), [len(part.ids) for part in row]) for row in rows_of_sequences]
        out_codes = [clip for sequence in sequences for clip in sequence.out_codes]
        labels = [np.concatenate([part.labels for part in row]) for row in rows_of_sequences]
        label_ids = self._pad(labels, tokens.IGNORE_INDEX)
        label_audio_ids = self._concatenate([clip for sequence in sequences for clip in sequence.out_labels])
        in_codes = [clip for sequence in sequences for clip in sequence.in_codes]
        windows = [window for sequence in sequences for window in sequence.windows]
        features, mask = self._mel_features(windows)
        input_ids = self._pad(ids, self._config.pad_token_id or 0)
        attention_mask = self._pad([np.ones(len(row), np.int64) for row in ids], 0)
        num_features = torch.tensor([_num_features(len(window)) for window in windows], dtype=torch.int64)
        expansion = expand_placeholders(
            self._config,
            input_ids,
            attention_mask,
            label_ids,
            self._pad(sample_ids, 0) if any(len(row) > 1 for row in rows) else None,
            num_features=num_features if windows else 0,
            num_codes=_lengths(in_codes) if in_codes else 0,
            num_frames=_lengths(out_codes),
            left_padding=False,
            round_to=TRAINING_ROUND_TO,
        )
        window_features = self._config.audio_encoder_config.max_source_positions // 2
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            audio_features=features,
            audio_feature_attention_mask=mask,
            audio_in_ids=self._concatenate(in_codes) if self._counter.in_codes else None,
            audio_in_ids_start=_start(in_codes) if self._counter.in_codes else None,
            audio_out_ids=self._concatenate(out_codes),
            audio_out_ids_start=_start(out_codes),
            label_ids=label_ids,
            label_audio_ids=label_audio_ids,
            indices=BatchIndices.from_expansion(
                expansion, num_features, window_features, next_labels(label_audio_ids, _start(out_codes))
            ),
            num_labels=int((label_ids != tokens.IGNORE_INDEX).sum()),
            num_code_labels=tuple((label_audio_ids != tokens.IGNORE_INDEX).sum(dim=1).tolist()),
        )

    def stream(self, codes_KT: NDArray[np.int16]) -> Tensor:
        """Return a clip's stream, (K, T + 2 + K − 1) int64 with the delay pattern, (K, T + 2) without."""
        codes = torch.from_numpy(codes_KT.astype(np.int64))
        return to_stream(codes, self._bos, self._eos, self._config.use_delay_pattern)

    def labels(self, codes_KT: NDArray[np.int16]) -> Tensor:
        """Return the labels of a clip's stream, in the same shape."""
        codes = torch.from_numpy(codes_KT.astype(np.int64))
        column = codes.new_ones(codes.shape[0], 1)
        labels = torch.cat([column * tokens.IGNORE_INDEX, codes, column * self._eos], dim=1)
        if not self._config.use_delay_pattern:
            return labels
        return apply_delay_pattern(labels, tokens.IGNORE_INDEX, tokens.IGNORE_INDEX)

    def _pad(self, rows: Sequence[NDArray[Any]], pad_value: int) -> Tensor:
        max_length = max(len(row) for row in rows)
        padded = np.full((len(rows), max_length), pad_value, np.int64)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = row
        return torch.from_numpy(padded)

    def _concatenate(self, clips: Sequence[Tensor]) -> Tensor:
        empty = torch.empty(self._config.audio_num_codebooks, 0, dtype=torch.int64)
        return torch.cat([empty, *clips], dim=1)

    def _mel_features(self, windows: Sequence[NDArray[np.int16]]) -> tuple[Tensor | None, Tensor | None]:
        """Return padded log mel spectrograms (windows, mel bins, mel frames) and the mask of valid frames."""
        if self._counter.window_samples is None:
            return None, None
        bins = self._config.audio_encoder_config.num_mel_bins
        num_frames = self._counter.window_samples // MEL_HOP_SAMPLES
        lengths = torch.tensor([-(-len(window) // MEL_HOP_SAMPLES) for window in windows], dtype=torch.int64)
        mask = torch.arange(num_frames) < lengths.unsqueeze(1)
        if not windows:
            return torch.empty(0, bins, num_frames), mask.long()
        waves = np.zeros((len(windows), self._counter.window_samples), np.float32)
        for index, window in enumerate(windows):
            waves[index, : len(window)] = window / _FULL_SCALE
        features = _extractor(bins)(
            list(waves), sampling_rate=SAMPLE_RATE_HZ, padding=False, truncation=False, return_tensors="pt"
        )
        return features["input_features"], mask.long()


@functools.lru_cache(maxsize=4)
def _extractor(mel_bins: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=mel_bins, sampling_rate=SAMPLE_RATE_HZ, hop_length=MEL_HOP_SAMPLES)


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """An example with its input recordings split into windows and its clips delayed."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    out_codes: list[Tensor]
    out_labels: list[Tensor]
    in_codes: list[Tensor]
    windows: list[NDArray[np.int16]]

    @classmethod
    def from_example(cls, collator: Collator, example: Example) -> _Sequence:
        config, counter = collator._config, collator._counter
        in_id, out_id = config.audio_in_token_idx, config.audio_out_token_idx
        ids = example.ids.astype(np.int64)
        labels = np.where(example.loss_mask, ids, tokens.IGNORE_INDEX)
        placeholders = np.flatnonzero((ids == in_id) | (ids == out_id))
        out_codes, out_labels, in_codes, windows = (
            list[Tensor](),
            list[Tensor](),
            list[Tensor](),
            list[NDArray[np.int16]](),
        )
        repeats = np.ones(len(ids), np.int64)
        for at, audio in zip(placeholders.tolist(), example.recordings, strict=True):
            num_frames = 0 if audio.codes_KT is None else audio.codes_KT.shape[1]
            num_samples = 0 if audio.samples_N is None else len(audio.samples_N)
            if ids[at] == out_id and audio.codes_KT is not None:
                out_codes.append(collator.stream(audio.codes_KT))
                clip_labels = collator.labels(audio.codes_KT)
                ignored = torch.full_like(clip_labels, tokens.IGNORE_INDEX)
                out_labels.append(clip_labels if example.loss_mask[at] else ignored)
                labels[at : at + 2] = tokens.IGNORE_INDEX
                continue
            spans = counter.windows(num_samples)
            repeats[at] = len(spans)
            if audio.samples_N is not None:
                windows += [audio.samples_N[start:stop] for start, stop in spans]
            if audio.codes_KT is not None:
                splits = [round(stop / num_samples * num_frames) for _, stop in spans[:-1]]
                in_codes += [collator.stream(part) for part in np.split(audio.codes_KT, splits, axis=1)]
        if (repeats > 1).any():
            order = _with_repeats(repeats)
            ids, labels = ids[order], labels[order]
        return cls(ids, labels, out_codes, out_labels, in_codes, windows)


def _with_repeats(repeats: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return token indices in which a placeholder and its two neighbours are repeated for each further window."""
    order: list[int] = []
    for index in range(len(repeats)):
        order.append(index)
        if index and repeats[index - 1] > 1:
            order += [index - 2, index - 1, index] * (int(repeats[index - 1]) - 1)
    return np.array(order)


def _lengths(clips: Sequence[Tensor]) -> Tensor:
    return torch.tensor([clip.shape[1] for clip in clips], dtype=torch.int64)


def _start(clips: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), _lengths(clips)]).cumsum(0)[:-1]
