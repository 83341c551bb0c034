"""What comes out of a synthesizer: takes, spoken chunks, and the samples between them."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]
Codes = NDArray[np.int16]
"""(K, T) codes of a take that is kept; codebooks are far smaller than the type."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One take that was made of a chunk, kept or not.

    Attributes:
        finish_reason: how it ended, as `FinishReason` says it.
        faults: names of what is wrong with it; see `higgs_model.audio.gate`.
        notes: what a recogniser said of it.
    """

    seed: int
    frames: int
    finish_reason: str
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Take:
    """What a chunk sounds like.

    Attributes:
        codes_KT: its frames, untrimmed.
        attempts: all that were made, in order.
        kept: which of them this is.
    """

    index: int
    codes_KT: Codes
    attempts: tuple[Attempt, ...]
    kept: int

    @property
    def attempt(self) -> Attempt:
        """The one that was kept."""
        return self.attempts[self.kept]

    @property
    def good(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.attempt.faults


@dataclasses.dataclass(frozen=True)
class SpokenChunk:
    """A chunk and where it is in the recording: samples [start, stop) of it."""

    index: int
    text: str
    speakers: tuple[str, ...]
    start_sample: int
    stop_sample: int
    sample_rate_hz: int
    take: Take

    @property
    def start_s(self) -> float:
        return self.start_sample / self.sample_rate_hz

    @property
    def end_s(self) -> float:
        return self.stop_sample / self.sample_rate_hz


@dataclasses.dataclass(frozen=True)
class Piece:
    """The next samples of a recording, and the chunk that ended with them, if one did."""

    samples_N: Samples
    chunk: SpokenChunk | None = None


@dataclasses.dataclass(frozen=True)
class Speech:
    """A whole recording.

    Attributes:
        waveform: (N,) float32.
        warnings: what the script's author should know.
    """

    waveform: Samples
    sample_rate: int
    chunks: tuple[SpokenChunk, ...]
    warnings: tuple[str, ...]
