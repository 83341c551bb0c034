"""Messages between ingress and synthesizer replicas: a request, and the events of its response.

A response is `Started` followed by any number of `AudioBlock`s; `Failed` may end it at any point. Script errors are
sent as events, so an exception from a replica always means that the replica was lost.
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
        row: a manifest row; its `ref_audio`, if any, is a placeholder for `reference`.
        reference: the content of the request's reference recording, already validated.
        live: stream samples while they are generated, with one take per chunk; otherwise stream each chunk once its
            best take is chosen.
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
    """A finished chunk; its samples are [start_sample, stop_sample) of the recording."""

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
class AudioBlock:
    """The next samples of the recording.

    Attributes:
        pcm: 16-bit mono samples; may be empty.
        completed_chunk: the chunk of the script that ends with these samples, if any.
    """

    pcm: bytes
    completed_chunk: ChunkMetadata | None = None


@dataclasses.dataclass(frozen=True)
class Failed:
    """The request failed.

    Attributes:
        kind: invalid input, a temporarily unavailable resource, or an internal error.
    """

    kind: Literal["input", "unavailable", "internal"]
    message: str


Event = Started | AudioBlock | Failed


class SynthesizerBackend(Protocol):
    """The interface of the synthesizer replicas that ingress replicas use."""

    def synthesize(self, request: SynthesisRequest) -> AsyncGenerator[Event]:
        """Yield the events of a request; closing the generator frees the request's slot.

        Raises:
            ServiceUnavailable: the replica was lost.
        """

    def slots(self) -> int:
        """Return the number of requests that can run concurrently; may be a few seconds old."""

    async def health(self) -> HealthStatus:
        """Return whether a replica is ready to serve requests."""
