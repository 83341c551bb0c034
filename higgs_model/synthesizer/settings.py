"""How scripts are spoken: everything that can be chosen beyond what a script says itself."""

from __future__ import annotations

import dataclasses

from higgs_model.audio.edges import Silence
from higgs_model.audio.gate import TakeLimits, TranscriptCheck
from higgs_model.errors import BadConfig


@dataclasses.dataclass(frozen=True)
class Pauses:
    """Milliseconds of pause after a chunk, by what ends it; what the takes keep of their own silence comes on top."""

    sentence: int = 200
    paragraph: int = 500
    turn: int = 600
    heading: int = 900

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 60_000:
                raise BadConfig(f"pauses: {name}={value} ms; wanted 0 to 60000")


@dataclasses.dataclass(frozen=True)
class SynthesisSettings:
    """What a `Synthesizer` does with every script.

    Attributes:
        seed: of scripts that give none.
        attempts: takes of a chunk that are made before the best one is kept, faults and all.
        limits: what a good take keeps within.
        check: listens to takes that passed everything else; None: nobody does.
        silence: what is cut off the ends of takes.
        pauses, fade_s, room_tone_dbfs: how takes are joined.
        segment_s: expected seconds after which a script is cut, at the next end of a paragraph, into segments that are
            spoken side by side; None: a script is spoken from its beginning to its end.
        segments_at_once: of one script.
    """

    seed: int = 0
    attempts: int = 3
    limits: TakeLimits = TakeLimits()
    check: TranscriptCheck | None = None
    silence: Silence = Silence()
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
