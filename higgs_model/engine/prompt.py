"""A request's prompt as the network is given it: one row a position, placeholders filled.

In: token ids with a placeholder a clip, and the clips' codes. Out: a `Positions` record on the host. A clip is
put into delayed form here; whether a recording or the model's own speech, its frames are audio positions.
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
class Positions:
    """P positions of a sequence.

    Attributes:
        ids_P: token ids; −1 where there is a frame.
        frames_PK: frames in delayed form; −1 where there is a token.
        spoken_WK: the last frames of the model's own clips, for the repetition rule; W may be anything.
    """

    ids_P: NDArray[np.int64]
    frames_PK: NDArray[np.int64]
    spoken_WK: NDArray[np.int64]

    @classmethod
    def blank(cls, length: int, num_codebooks: int) -> Positions:
        """Half text, half audio, of no meaning."""
        ids, frames = np.zeros(length, np.int64), np.full((length, num_codebooks), -1)
        ids[length // 2 :], frames[length // 2 :] = -1, 0
        return cls(ids, frames, np.empty((0, num_codebooks), np.int64))

    def __len__(self) -> int:
        return len(self.ids_P)

    def with_token(self, token: int) -> Positions:
        """One position longer."""
        no_frame = np.full((1, self.frames_PK.shape[1]), -1)
        ids = np.append(self.ids_P, token)
        return dataclasses.replace(self, ids_P=ids, frames_PK=np.concatenate([self.frames_PK, no_frame]))

    @property
    def content_PC(self) -> NDArray[np.int64]:
        """All that the network is given at each position, (P, 1 + K)."""
        return np.concatenate([self.ids_P[:, None], self.frames_PK], axis=1)


def expand(
    config: HiggsAudioConfig, input_ids: Sequence[int], clips: Sequence[NDArray[np.int64]], where: str
) -> Positions:
    """Fill the placeholders.

    Raises:
        BadInput: ids, placeholders and clips do not fit together; the sentence begins with `where`.
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    if ids.ndim != 1 or not len(ids):
        raise BadInput(f"{where}: its prompt has no token")
    vocabulary = config.text_config.vocab_size
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise BadInput(
            f"{where}: token ids reach from {ids.min()} to {ids.max()}, the vocabulary from 0 to {vocabulary - 1}"
        )
    places = np.flatnonzero((ids == config.audio_in_token_idx) | (ids == config.audio_out_token_idx))
    if len(places) != len(clips):
        raise BadInput(f"{where}: its prompt has {len(places)} placeholders for {len(clips)} clips")
    num_codebooks = config.audio_num_codebooks
    parts_ids, parts_frames, spoken, done = [], [], [], 0
    for index, (place, codes) in enumerate(zip(places.tolist(), clips, strict=True)):
        stream_TK = _stream(config, np.asarray(codes), f"{where}: clip {index}")
        parts_ids += [ids[done:place], np.full(len(stream_TK), -1)]
        parts_frames += [np.full((place - done, num_codebooks), -1), stream_TK]
        if ids[place] == config.audio_out_token_idx:
            spoken.append(stream_TK)
        done = place + 1
    parts_ids.append(ids[done:])
    parts_frames.append(np.full((len(ids) - done, num_codebooks), -1))
    return Positions(
        ids_P=np.concatenate(parts_ids),
        frames_PK=np.concatenate(parts_frames),
        spoken_WK=np.concatenate(spoken) if spoken else np.empty((0, num_codebooks), np.int64),
    )


def _stream(config: HiggsAudioConfig, codes_KT: NDArray[np.int64], where: str) -> NDArray[np.int64]:
    """(K, T) → (T', K) as the network hears it."""
    num_codebooks, size = config.audio_num_codebooks, config.audio_codebook_size
    if codes_KT.ndim != 2 or codes_KT.shape[0] != num_codebooks or not np.issubdtype(codes_KT.dtype, np.integer):
        raise BadInput(
            f"{where} is {codes_KT.dtype} of the shape {codes_KT.shape}; wanted integers ({num_codebooks}, frames)"
        )
    if codes_KT.size and (codes_KT.min() < 0 or codes_KT.max() >= size):
        raise BadInput(f"{where} has codes from {codes_KT.min()} to {codes_KT.max()}; wanted 0 to {size - 1}")
    bos, eos = config.audio_stream_bos_id, config.audio_stream_eos_id
    if bos is None or eos is None:
        raise BadInput(f"{where}: this checkpoint has no stream tokens to frame it with")
    stream = to_stream(torch.from_numpy(codes_KT.astype(np.int64)), bos, eos, config.use_delay_pattern)
    return np.ascontiguousarray(stream.T.numpy())
