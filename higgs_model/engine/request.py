"""What goes into the engine and what comes out: `Request`, `Update`, and how a request can end.

Frames here are sound alone, (K, T) codes with the delay pattern undone; stream tokens never leave the engine.
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
    """Why no more frames of a request will come."""

    STOP = "stop"
    """The model ended the clip, or its text, by itself."""
    LENGTH = "length"
    """`max_frames` was reached, or as many text tokens went by without a clip."""
    LOOP = "loop"
    """The same frames came again and again."""
    SILENCE = "silence"
    """Nothing but silence came for too long."""
    INVALID = "invalid"
    """The network gave numbers that are none."""
    STALLED = "stalled"
    """It held a slot and did not get on: a fault of ours."""
    CANCELLED = "cancelled"
    """Whoever asked for it no longer wants it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One clip to be spoken.

    Attributes:
        id: names it; no two requests of one id are in the engine at the same time.
        input_ids: token ids of the prompt, with one placeholder a clip. A prompt that ends in <|audio_out_bos|> is
            answered with audio, any other with text until the model opens a clip by itself.
        clips: codes (K, T) of what fills the placeholders, in order.
        sampling: how codes are drawn.
        seed: with the prompt and `sampling`, all that the codes depend on.
        max_frames: frames of sound after which the clip is ended.
        priority: lower goes first; within one priority it is first come, first served.
        stream_every: give out frames as soon as so many are final (the first one at once); None: all at the end.
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
    """What has become of a request since the last update: its next frames (K, T), and whether it has ended."""

    request_id: str
    frames: Codes
    finish_reason: FinishReason | None = None
