"""Settings of synthesis that are not part of a script."""

from __future__ import annotations

import dataclasses

from higgs_model.audio.silence_trimming import TrimSettings
from higgs_model.audio.take_checks import TakeLimits, TranscriptCheck
from higgs_model.errors import BadConfig


@dataclasses.dataclass(frozen=True)
class Pauses:
    """Pauses after a chunk in milliseconds, by the boundary at its end; silence within the takes is extra."""

    sentence: int = 200
    paragraph: int = 500
    turn: int = 600
    heading: int = 900

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 60_000:
                raise BadConfig(f"pauses: {name}={value} ms; expected 0 to 60000")


@dataclasses.dataclass(frozen=True)
class SynthesisSettings:
    """Settings of a `Synthesizer`.

    Attributes:
        seed: default for scripts without one.
        attempts: maximum takes per chunk; the best one is kept.
        limits: limits that a take must stay within to have no faults.
        check: transcript check of takes that passed all other checks.
        silence: trimming of silence at the ends of takes.
        pauses, fade_s, room_tone_dbfs: pauses between takes, and the fades and room tone that join them.
        segment_s: expected duration after which a script is split, at the next paragraph end, into segments that are
            synthesized in parallel; None: scripts are synthesized sequentially.
        segments_at_once: maximum parallel segments of a script.
    """

    seed: int = 0
    attempts: int = 3
    limits: TakeLimits = TakeLimits()
    check: TranscriptCheck | None = None
    silence: TrimSettings = TrimSettings()
    pauses: Pauses = Pauses()
    fade_s: float = 0.005
    room_tone_dbfs: float | None = -75.0
    segment_s: float | None = None
    segments_at_once: int = 16

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise BadConfig(f"synthesis settings: attempts={self.attempts} is not positive")
        if self.segments_at_once < 1:
            raise BadConfig(f"synthesis settings: segments_at_once={self.segments_at_once} is not positive")
        if self.segment_s is not None and self.segment_s <= 0:
            raise BadConfig(f"synthesis settings: segment_s={self.segment_s} is not positive")
