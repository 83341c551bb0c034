"""Turns a synthesizer's events into a response body.

    request ─▶ started, first samples available ─▶ speed ─▶ encoder ─▶ audio bytes, or server-sent events

A stream is opened before the HTTP status is sent, so invalid scripts and a full queue are ordinary error responses.
Later failures end server-sent events with an error event, and abort a plain audio stream, so that no client mistakes a
partial recording for a complete one.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import numpy as np

from higgs_model.audio.streams import StreamEncoder
from higgs_model.audio.time_stretch import TimeStretcher
from higgs_model.audio.writers import to_pcm16
from higgs_model.errors import BadInput
from serve.http.background import run_in_thread
from serve.http.errors import ApiError, BadRequest, GatewayTimeout, InternalServerError, ServiceUnavailable
from serve.http.request_log import RequestContext
from serve.http.request_models import DeliveryOptions
from serve.speech.events import AudioBlock, ChunkMetadata, Event, Failed, Started, SynthesisRequest, SynthesizerBackend

_RETRY_UNAVAILABLE_S = 10


class SpeechStream:
    """An open response. The caller must call `close`.

    Args:
        first_blocks: audio received so far.
        events: the remaining events.
    """

    def __init__(
        self,
        started: Started,
        first_blocks: list[AudioBlock],
        events: AsyncGenerator[Event],
        delivery: DeliveryOptions,
        request_id: str,
        context: RequestContext,
    ) -> None:
        self.started, self.delivery, self.request_id, self.context = started, delivery, request_id, context
        self.chunks: list[ChunkMetadata] = []
        self._first_blocks, self._events = first_blocks, events
        self._encoder = _OutputEncoder(delivery, started.sample_rate_hz)

    @property
    def usage(self) -> dict[str, int]:
        """OpenAI's token usage, with text tokens as input and audio frames as output."""
        frames = sum(chunk.frames for chunk in self.chunks)
        tokens = self.started.input_tokens
        return {"input_tokens": tokens, "output_tokens": frames, "total_tokens": tokens + frames}

    @property
    def duration_s(self) -> float:
        """Seconds of audio encoded so far."""
        return self.context.audio_s

    async def encoded_audio(self) -> AsyncGenerator[tuple[bytes, ChunkMetadata | None]]:
        """Yield encoded bytes, and the metadata of each chunk when it is complete."""
        inline = self.delivery.speed == 1 and self.delivery.response_format in ("pcm", "wav")
        async for event in self._audio_blocks():
            num_samples, encoded = await run_in_thread(self._encoder.push, event.pcm, inline=inline)
            self.context.audio_s += num_samples / self.started.sample_rate_hz
            if event.completed_chunk is not None:
                self.chunks.append(event.completed_chunk)
                self.context.chunks += 1
            if encoded or event.completed_chunk is not None:
                yield encoded, event.completed_chunk
        num_samples, encoded = await run_in_thread(self._encoder.finish, inline=inline)
        self.context.audio_s += num_samples / self.started.sample_rate_hz
        if encoded:
            yield encoded, None

    async def audio_bytes(self) -> AsyncIterator[bytes]:
        """Yield the encoded audio without metadata."""
        try:
            async with contextlib.aclosing(self.encoded_audio()) as parts:
                async for encoded, _ in parts:
                    if encoded:
                        yield encoded
        except ApiError as error:
            self._record_error(error)
            raise

    async def server_sent_events(self, *, with_chunks: bool) -> AsyncIterator[bytes]:
        """Yield OpenAI's speech events, and with `with_chunks` our own events for the start and each chunk."""
        if with_chunks:
            yield _format_sse({"type": "speech.started"} | self.metadata())
        try:
            async with contextlib.aclosing(self.encoded_audio()) as parts:
                async for encoded, chunk in parts:
                    if encoded:
                        yield _format_sse({"type": "speech.audio.delta", "audio": base64.b64encode(encoded).decode()})
                    if chunk is not None and with_chunks:
                        yield _format_sse({"type": "speech.chunk.done", "chunk": self.chunk_row(chunk)})
        except ApiError as error:
            self._record_error(error)
            yield _format_sse({"type": "error"} | error.body())
            return
        yield _format_sse({"type": "speech.audio.done", "usage": self.usage})

    async def to_json(self) -> dict[str, Any]:
        """Return the complete response as one object, with the audio as base64."""
        async with contextlib.aclosing(self.encoded_audio()) as parts:
            audio = b"".join([encoded async for encoded, _ in parts])
        return self.metadata() | {
            "duration_s": round(self.duration_s, 6),
            "chunks": [self.chunk_row(chunk) for chunk in self.chunks],
            "status": "flagged" if any(chunk.faults for chunk in self.chunks) else "ok",
            "usage": self.usage,
            "audio": base64.b64encode(audio).decode(),
        }

    def _record_error(self, error: ApiError) -> None:
        """Record an error after the HTTP status was sent, for the request log and metrics."""
        self.context.outcome, self.context.error = error.code or "error", error.message

    def metadata(self) -> dict[str, Any]:
        """Return the response metadata available before the first sample."""
        return {
            "id": self.request_id,
            "format": self.delivery.response_format,
            "sample_rate": self.started.sample_rate_hz,
            "num_chunks": self.started.num_chunks,
            "warnings": list(self.started.warnings),
        }

    def chunk_row(self, chunk: ChunkMetadata) -> dict[str, Any]:
        """Return a chunk in the format of a batch job's results."""
        samples_per_s = self.started.sample_rate_hz * self.delivery.speed
        return {
            "index": chunk.index,
            "text": chunk.text,
            "speakers": list(chunk.speakers),
            "start_s": round(chunk.start_sample / samples_per_s, 6),
            "end_s": round(chunk.stop_sample / samples_per_s, 6),
            "frames": chunk.frames,
            "seed": chunk.seed,
            "attempts": chunk.attempts,
            "finish_reason": chunk.finish_reason,
            "faults": list(chunk.faults),
        }

    async def _audio_blocks(self) -> AsyncGenerator[AudioBlock]:
        for block in self._first_blocks:
            yield block
        async for event in self._events:
            if isinstance(checked := _raise_if_failed(event), AudioBlock):
                yield checked

    async def close(self) -> None:
        """Free the slot, whether or not the stream has finished."""
        await self._events.aclose()


async def open_speech_stream(
    backend: SynthesizerBackend,
    request: SynthesisRequest,
    delivery: DeliveryOptions,
    context: RequestContext,
    warnings: tuple[str, ...],
    deadline_s: float,
) -> SpeechStream:
    """Start a request and wait for its first samples.

    Args:
        warnings: warnings to send with those of the synthesizer.
        deadline_s: time on the event loop's clock by which the response must be complete.

    Raises:
        ApiError: the request is invalid, or cannot be served now.
    """
    events = _with_deadline(backend.synthesize(request), deadline_s)
    try:
        started = _raise_if_failed(await anext(events, None))
        if not isinstance(started, Started):
            raise InternalServerError("the synthesizer returned no events")
        context.queued_s = context.elapsed_s()
        first_blocks: list[AudioBlock] = []
        while not any(block.pcm for block in first_blocks):
            event = _raise_if_failed(await anext(events, None))
            if not isinstance(event, AudioBlock):
                raise BadRequest(
                    "no audio was generated for this text; check that it contains words, or try another seed",
                    param="input",
                )
            first_blocks.append(event)
        context.first_audio_s = context.elapsed_s()
        started = dataclasses.replace(started, warnings=(*warnings, *started.warnings))
        return SpeechStream(started, first_blocks, events, delivery, request.request_id, context)
    except BaseException:
        await events.aclose()
        raise


async def _with_deadline(events: AsyncGenerator[Event], deadline_s: float) -> AsyncGenerator[Event]:
    async with contextlib.aclosing(events):
        while True:
            try:
                async with asyncio.timeout_at(deadline_s):
                    event = await anext(events, None)
            except TimeoutError:
                raise GatewayTimeout("the request exceeded its time limit; send less text per request") from None
            if event is None:
                return
            yield event


def _raise_if_failed(event: Event | None) -> Event | None:
    if not isinstance(event, Failed):
        return event
    if event.kind == "input":
        raise BadRequest(event.message)
    if event.kind == "unavailable":
        raise ServiceUnavailable(event.message, retry_after_s=_RETRY_UNAVAILABLE_S)
    raise InternalServerError(event.message)


class _OutputEncoder:
    """Changes the playback speed of samples and encodes them."""

    def __init__(self, delivery: DeliveryOptions, sample_rate_hz: int) -> None:
        try:
            self._encoder = StreamEncoder(delivery.response_format, sample_rate_hz)
        except BadInput as error:
            raise BadRequest(str(error), param="response_format") from None
        self._speed = TimeStretcher(delivery.speed, sample_rate_hz) if delivery.speed != 1 else None

    def push(self, pcm: bytes) -> tuple[int, bytes]:
        """Encode samples; return the number of new output samples, and the bytes that are ready to send."""
        if not pcm:
            return 0, b""
        samples_N = np.frombuffer(pcm, np.int16)
        if self._speed is not None:
            samples_N = to_pcm16(self._speed.push(samples_N.astype(np.float32) / np.float32(32768)))
        return len(samples_N), self._encoder.write(samples_N)

    def finish(self) -> tuple[int, bytes]:
        """Flush the encoder; return the number of remaining output samples, and their bytes."""
        if self._speed is None:
            return 0, self._encoder.finish()
        samples_N = to_pcm16(self._speed.finish())
        return len(samples_N), self._encoder.write(samples_N) + self._encoder.finish()


def _format_sse(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=True)}\n\n".encode()
