"""Output of a synthesizer: takes, chunks, and pieces of the recording."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]
Codes = NDArray[np.int16]
"""(K, T) codes of a take; codebook sizes fit into int16."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """Metadata of one take of a chunk, kept or not.

    Attributes:
        finish_reason: a value of `FinishReason`.
        faults: names of its faults; see `higgs_model.audio.gate`.
        notes: findings of the transcript check.
    """

    seed: int
    frames: int
    finish_reason: str
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Take:
    """The kept take of a chunk.

    Attributes:
        codes_KT: its codes, untrimmed.
        attempts: all takes of the chunk, in order.
        kept: the index of this take in `attempts`.
    """

    index: int
    codes_KT: Codes
    attempts: tuple[Attempt, ...]
    kept: int

    @property
    def attempt(self) -> Attempt:
        """The metadata of this take."""
        return self.attempts[self.kept]

    @property
    def good(self) -> bool:
        """Whether it has no faults."""
        return not self.attempt.faults


@dataclasses.dataclass(frozen=True)
class SpokenChunk:
    """A synthesized chunk, and its range [start, stop) of the recording's samples."""

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
    """The next samples of a recording, and the chunk that they complete, if any."""

    samples_N: Samples
    chunk: SpokenChunk | None = None


@dataclasses.dataclass(frozen=True)
class Speech:
    """A complete recording.

    Attributes:
        waveform: (N,) float32.
        warnings: messages for the author of the script.
    """

    waveform: Samples
    sample_rate: int
    chunks: tuple[SpokenChunk, ...]
    warnings: tuple[str, ...]
