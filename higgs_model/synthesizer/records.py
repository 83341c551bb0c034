"""Outputs of a synthesizer: takes, chunks, and pieces of a recording."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]
Codes = NDArray[np.int16]
"""(K, T) codes of a take; int16 is enough for the codebook size."""


@dataclasses.dataclass(frozen=True)
class TakeMetadata:
    """Metadata of a take, which remains when its codes are discarded.

    Attributes:
        seed: seed of its random numbers.
        frames: number of frames.
        finish_reason: a value of `FinishReason`.
        faults: names of its faults; see `higgs_model.audio.take_checks`.
        notes: findings of the transcript check.
    """

    seed: int
    frames: int
    finish_reason: str
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Take:
    """A take: one generation of a chunk, with its codes. Of several takes of a chunk, only the selected one is kept.

    Attributes:
        index: index of the chunk.
        codes_KT: its codes; silence at the ends is not trimmed.
        attempts: metadata of this and the other takes of the chunk, in order.
        attempt_index: index of this take in `attempts`.
    """

    index: int
    codes_KT: Codes
    attempts: tuple[TakeMetadata, ...]
    attempt_index: int

    @property
    def attempt(self) -> TakeMetadata:
        """The metadata of this take."""
        return self.attempts[self.attempt_index]

    @property
    def passed_checks(self) -> bool:
        """Whether the take has no faults."""
        return not self.attempt.faults


@dataclasses.dataclass(frozen=True)
class SynthesizedChunk:
    """A synthesized chunk; it covers samples [start_sample, stop_sample) of the recording."""

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
    chunk: SynthesizedChunk | None = None


@dataclasses.dataclass(frozen=True)
class Speech:
    """A complete recording.

    Attributes:
        waveform: (N,) float32.
        sample_rate: in Hz.
        warnings: messages for the author of the script.
    """

    waveform: Samples
    sample_rate: int
    chunks: tuple[SynthesizedChunk, ...]
    warnings: tuple[str, ...]
