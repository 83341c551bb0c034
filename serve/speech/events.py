"""Messages between the endpoint's HTTP workers and its synthesizer replicas: a request, and the events of its response.

A response is `Started` followed by any number of `AudioChunk`s, or ends with `Failed` at any point. Errors in a script
are sent as events, so an exception between the two always means that a replica was lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from typing import Any, Literal, Protocol

HealthStatus = Literal["loading", "ready", "broken"]


@dataclasses.dataclass(frozen=True)
class SynthesisRequest:
    """A script to synthesize.

    Attributes:
        row: as in a manifest; if it has `ref_audio`, that is a placeholder for `reference`.
        reference: the content of the request's reference recording, checked.
        live: stream samples while they are generated, with one take per chunk; otherwise stream chunks that passed
            their checks.
    """

    request_id: str
    row: dict[str, Any]
    reference: bytes | None
    live: bool


@dataclasses.dataclass(frozen=True)
class Started:
    """The script is valid and its synthesis has started."""

    sample_rate_hz: int
    num_chunks: int
    input_tokens: int
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ChunkMetadata:
    """A finished chunk, and its range [start, stop) of the recording's samples."""

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
class AudioChunk:
    """The next samples as 16-bit PCM, and the metadata of the chunk that they complete, if any."""

    pcm: bytes
    chunk: ChunkMetadata | None = None


@dataclasses.dataclass(frozen=True)
class Failed:
    """The request failed.

    Attributes:
        kind: invalid input, something temporarily unavailable, or an internal error.
    """

    kind: Literal["input", "unavailable", "internal"]
    message: str


Event = Started | AudioChunk | Failed


class SynthesizerBackend(Protocol):
    """The synthesizer replicas, as HTTP workers see them."""

    def synthesize(self, request: SynthesisRequest) -> AsyncGenerator[Event]:
        """Yield the events of a request; closing the generator frees its slot.

        Raises:
            ServiceUnavailable: the replica was lost.
        """

    def slots(self) -> int:
        """Return how many requests can run at the same time, as far as is known."""

    async def health(self) -> HealthStatus:
        """Return whether a replica can serve requests."""
