"""Expands a request's prompt into one row per position, as the network reads it.

In: token ids with one placeholder per clip, and the clips' codes. Out: an `ExpandedPrompt` on the host. Clips are put
into delayed form here; their frames are audio positions, whether they are recordings or the model's own speech.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from higgs_model.config import HiggsAudioConfig
from higgs_model.delay import to_stream
from higgs_model.errors import BadInput


@dataclasses.dataclass(frozen=True)
class ExpandedPrompt:
    """P positions of a sequence.

    Attributes:
        ids_P: token ids; −1 at audio positions.
        frames_PK: frames in delayed form; −1 at text positions.
        history_WK: the most recent frames of the model's own clips, for repetition-aware sampling.
    """

    ids_P: NDArray[np.int64]
    frames_PK: NDArray[np.int64]
    history_WK: NDArray[np.int64]

    @classmethod
    def dummy(cls, length: int, num_codebooks: int) -> ExpandedPrompt:
        """Return a prompt for warm-up: half text, half audio."""
        ids, frames = np.zeros(length, np.int64), np.full((length, num_codebooks), -1)
        ids[length // 2 :], frames[length // 2 :] = -1, 0
        return cls(ids, frames, np.empty((0, num_codebooks), np.int64))

    def __len__(self) -> int:
        return len(self.ids_P)

    def with_token(self, token: int) -> ExpandedPrompt:
        """Return a copy with one more text position."""
        no_frame = np.full((1, self.frames_PK.shape[1]), -1)
        ids = np.append(self.ids_P, token)
        return dataclasses.replace(self, ids_P=ids, frames_PK=np.concatenate([self.frames_PK, no_frame]))

    @property
    def content_PC(self) -> NDArray[np.int64]:
        """Everything the network reads at each position, (P, 1 + K)."""
        return np.concatenate([self.ids_P[:, None], self.frames_PK], axis=1)


def expand_prompt(
    config: HiggsAudioConfig, input_ids: Sequence[int], clips: Sequence[NDArray[np.int64]], name: str
) -> ExpandedPrompt:
    """Fill the placeholders of a prompt with the frames of its clips.

    Args:
        name: how error messages refer to the request.

    Raises:
        BadInput: ids, placeholders and clips do not match.
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    if ids.ndim != 1 or not len(ids):
        raise BadInput(f"{name}: the prompt is empty")
    vocabulary = config.text_config.vocab_size
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise BadInput(
            f"{name}: token ids range from {ids.min()} to {ids.max()}, the vocabulary from 0 to {vocabulary - 1}"
        )
    placeholders = np.flatnonzero((ids == config.audio_in_token_idx) | (ids == config.audio_out_token_idx))
    if len(placeholders) != len(clips):
        raise BadInput(f"{name}: the prompt has {len(placeholders)} placeholders for {len(clips)} clips")
    num_codebooks = config.audio_num_codebooks
    ids_parts, frames_parts, history, start = [], [], [], 0
    for index, (at, codes) in enumerate(zip(placeholders.tolist(), clips, strict=True)):
        stream_TK = _delayed_stream(config, np.asarray(codes), f"{name}: clip {index}")
        ids_parts += [ids[start:at], np.full(len(stream_TK), -1)]
        frames_parts += [np.full((at - start, num_codebooks), -1), stream_TK]
        if ids[at] == config.audio_out_token_idx:
            history.append(stream_TK)
        start = at + 1
    ids_parts.append(ids[start:])
    frames_parts.append(np.full((len(ids) - start, num_codebooks), -1))
    return ExpandedPrompt(
        ids_P=np.concatenate(ids_parts),
        frames_PK=np.concatenate(frames_parts),
        history_WK=np.concatenate(history) if history else np.empty((0, num_codebooks), np.int64),
    )


def _delayed_stream(config: HiggsAudioConfig, codes_KT: NDArray[np.int64], name: str) -> NDArray[np.int64]:
    """(K, T) codes → (T', K) frames with BOS, EOS and the delay pattern applied."""
    num_codebooks, size = config.audio_num_codebooks, config.audio_codebook_size
    if codes_KT.ndim != 2 or codes_KT.shape[0] != num_codebooks or not np.issubdtype(codes_KT.dtype, np.integer):
        raise BadInput(
            f"{name} is {codes_KT.dtype} of shape {codes_KT.shape}; "
            f"expected integers of shape ({num_codebooks}, frames)"
        )
    if codes_KT.size and (codes_KT.min() < 0 or codes_KT.max() >= size):
        raise BadInput(f"{name} has codes from {codes_KT.min()} to {codes_KT.max()}; expected 0 to {size - 1}")
    bos, eos = config.audio_stream_bos_id, config.audio_stream_eos_id
    if bos is None or eos is None:
        raise BadInput(f"{name}: this checkpoint has no stream BOS and EOS ids to frame it with")
    stream = to_stream(torch.from_numpy(codes_KT.astype(np.int64)), bos, eos, config.use_delay_pattern)
    return np.ascontiguousarray(stream.T.numpy())
