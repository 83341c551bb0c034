"""What passes between the endpoint's HTTP workers and its synthesizers: a job, and the events that answer it.

An answer is `Started`, then any number of `Sound`, then nothing; or `Failed` at any point, and nothing after it. Faults
of a script travel as records, so that an exception between the two always means that a synthesizer was lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from typing import Any, Literal, Protocol

Condition = Literal["loading", "ready", "broken"]


@dataclasses.dataclass(frozen=True)
class SpeakJob:
    """A script to be spoken.

    Attributes:
        row: as in a manifest; if it has `ref_audio`, that is a placeholder for `reference`.
        reference: bytes of a recording that came with the request, checked.
        live: samples go out while they are made, in one take; else a chunk goes out when it has passed its checks.
    """

    request_id: str
    row: dict[str, Any]
    reference: bytes | None
    live: bool


@dataclasses.dataclass(frozen=True)
class Started:
    """A synthesizer has begun, and the script can be spoken as far as can be seen."""

    sample_rate_hz: int
    num_chunks: int
    input_tokens: int
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ChunkFacts:
    """A chunk that has been spoken, and where: samples [start, stop) of the recording."""

    index: int
    text: str
    speakers: tuple[str, ...]
    start_sample: int
    stop_sample: int
    frames: int
    seed: int
    attempts: int
    finish_reason: str
    faults: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sound:
    """The next samples, 16 bit, and the chunk that ended with them, if one did."""

    pcm: bytes
    chunk: ChunkFacts | None = None


@dataclasses.dataclass(frozen=True)
class Failed:
    """It cannot be spoken.

    Attributes:
        kind: what was asked for is wrong, something is not there now, or the fault is ours.
    """

    kind: Literal["input", "away", "internal"]
    message: str


Event = Started | Sound | Failed


class Backend(Protocol):
    """The synthesizers, as HTTP workers see them."""

    def speak(self, job: SpeakJob) -> AsyncGenerator[Event]:
        """The events of a job; closing the generator frees its slot.

        Raises:
            NotReady: the synthesizer was lost.
        """

    def slots(self) -> int:
        """How many jobs can be spoken at the same time, as far as is known."""

    async def condition(self) -> Condition:
        """Whether anybody can speak."""
