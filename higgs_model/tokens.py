"""Special tokens: their text, their meaning, and their ids in the published checkpoints.

The ids here are only the defaults of the configuration; code reads them from `HiggsAudioConfig` or the tokenizer.

Stream tokens are part of each codebook, after its codes: a codebook of `size` codes uses the ids 0 … size − 1 for
sound, then `stream_bos_id(size)` and `stream_eos_id(size)`.
"""

from __future__ import annotations

AUDIO_BOS = "<|audio_bos|>"
"""Opens a recording in a user or system message."""
AUDIO_EOS = "<|audio_eos|>"
"""Closes any audio. The model generates it after the last frame of a clip."""
AUDIO_OUT_BOS = "<|audio_out_bos|>"
"""Opens audio in an assistant message. The model generates frames after it."""
AUDIO_IN = "<|AUDIO|>"
"""Placeholder for a complete recording in a user or system message."""
AUDIO_OUT = "<|AUDIO_OUT|>"
"""Placeholder for a complete clip of frames in an assistant message."""

AUDIO_BOS_ID = 128011
AUDIO_EOS_ID = 128012
AUDIO_OUT_BOS_ID = 128013
AUDIO_DELAY_ID = 128014
"""Used by the transformers layout only: marks the frames in which a clip is ending."""
AUDIO_IN_ID = 128015
AUDIO_OUT_ID = 128016
PAD_ID = 128001
EOT_ID = 128009
"""`<|eot_id|>`, the end of a message."""

IGNORE_INDEX = -100
"""Label that the loss ignores."""

NUM_STREAM_TOKENS = 2
"""Stream tokens that every codebook has in addition to its codes: BOS and EOS."""


def stream_bos_id(codebook_size: int) -> int:
    """Return the id that fills a clip before its first frame, and the positions that the delay pattern opens there."""
    return codebook_size


def stream_eos_id(codebook_size: int) -> int:
    """Return the id that fills a clip after its last frame, and the positions that the delay pattern opens there."""
    return codebook_size + 1
