"""Input and output of the engine: `Request`, `Update`, and the reasons a request can finish.

Frames here are codec codes, (K, T) with the delay pattern undone; stream tokens never leave the engine.
"""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
from numpy.typing import NDArray

from higgs_model.sampling import SamplingParams

Codes = NDArray[np.int64]
"""(K, T) codes of the codec, 0 ≤ code < codebook size."""


class FinishReason(enum.Enum):
    """Why a request has finished."""

    STOP = "stop"
    """The model ended the clip, or its text."""
    LENGTH = "length"
    """`max_frames` was reached, or as many text tokens were generated without a clip."""
    LOOP = "loop"
    """The same frames repeated."""
    SILENCE = "silence"
    """The clip was silent for too long."""
    INVALID = "invalid"
    """The network returned NaN or infinity."""
    STALLED = "stalled"
    """The request held a slot without making progress: an internal error."""
    CANCELLED = "cancelled"
    """The caller cancelled it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One clip to generate.

    Attributes:
        id: unique among the requests in the engine.
        input_ids: token ids of the prompt, with one placeholder per clip. A prompt that ends in <|audio_out_bos|> is
            answered with audio, any other with text until the model opens a clip.
        clips: codes (K, T) for the placeholders, in order.
        sampling: how codes are sampled.
        seed: together with the prompt and `sampling`, determines the generated codes.
        max_frames: the clip is ended after this many frames.
        priority: requests with a lower value run first; within one priority, in order of arrival.
        stream_every: emit frames as soon as this many are final (the first one at once); None: all at the end.
    """

    id: str
    input_ids: tuple[int, ...]
    clips: tuple[Codes, ...] = ()
    sampling: SamplingParams = SamplingParams(do_sample=True)
    seed: int = 0
    max_frames: int = 1500
    priority: int = 0
    stream_every: int | None = None


@dataclasses.dataclass(frozen=True)
class Update:
    """The new frames (K, T) of a request since its last update, and why it has finished, if it has."""

    request_id: str
    frames: Codes
    finish_reason: FinishReason | None = None
