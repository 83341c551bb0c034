"""The one home of every special token: its text, what it means, and the id it has in the published checkpoints.

Ids here are only defaults of the configuration; code reads them from `HiggsAudioConfig` or from the tokenizer.

Stream tokens live inside each codebook, after its codes: a codebook of `size` codes has the ids 0 … size − 1 for
sound, `stream_bos_id(size)` and `stream_eos_id(size)`.
"""

from __future__ import annotations

AUDIO_BOS = "<|audio_bos|>"
"""Opens a recording in a user or system message."""
AUDIO_EOS = "<|audio_eos|>"
"""Closes any audio; the model says it after the last frame of its own."""
AUDIO_OUT_BOS = "<|audio_out_bos|>"
"""Opens audio in an assistant message; after it the model speaks frames."""
AUDIO_IN = "<|AUDIO|>"
"""Stands for a whole recording in a user or system message."""
AUDIO_OUT = "<|AUDIO_OUT|>"
"""Stands for a whole clip of frames in an assistant message."""

AUDIO_BOS_ID = 128011
AUDIO_EOS_ID = 128012
AUDIO_OUT_BOS_ID = 128013
AUDIO_DELAY_ID = 128014
"""Known to the transformers layout only: marks the frames in which a clip is ending."""
AUDIO_IN_ID = 128015
AUDIO_OUT_ID = 128016
PAD_ID = 128001
EOT_ID = 128009
"""`<|eot_id|>`, the end of a message."""

IGNORE_INDEX = -100
"""A label that takes no part in a loss."""

NUM_STREAM_TOKENS = 2
"""Every codebook has these beyond its codes: BOS and EOS."""


def stream_bos_id(codebook_size: int) -> int:
    """Fills a clip's column before the first frame and the places that the delay pattern leaves open there."""
    return codebook_size


def stream_eos_id(codebook_size: int) -> int:
    """Fills a clip's column after the last frame and the places that the delay pattern leaves open there."""
    return codebook_size + 1
