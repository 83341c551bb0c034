"""From a synthesizer's events to the bytes of an answer.

    job ─▶ opened: started, first samples there ─▶ speed ─▶ encoder ─▶ audio bytes, or server-sent events

An answer is opened before its status is sent, so whatever is wrong with a script, and a full queue, is an error in
the usual shape. What goes wrong later ends server-sent events with an error, and breaks off a plain stream, so that no
client takes half a recording for a whole one.
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

from higgs_model.audio.speed import SpeedChanger
from higgs_model.audio.streams import StreamEncoder
from higgs_model.audio.writers import to_pcm16
from higgs_model.errors import BadInput
from serve.http.background import aside
from serve.http.errors import ApiError, BadRequest, Internal, NotReady, TooSlow
from serve.http.request_log import RequestFacts
from serve.http.request_models import Delivery
from serve.speech.events import Backend, ChunkFacts, Event, Failed, Sound, SpeakJob, Started

_RETRY_AWAY_S = 10


class Answer:
    """An answer under way, opened; its generator must be closed.

    Args:
        held: the first sounds.
        events: of its job, after those.
    """

    def __init__(
        self,
        started: Started,
        held: list[Sound],
        events: AsyncGenerator[Event],
        delivery: Delivery,
        request_id: str,
        facts: RequestFacts,
    ) -> None:
        self.started, self.delivery, self.request_id, self.facts = started, delivery, request_id, facts
        self.chunks: list[ChunkFacts] = []
        self._held, self._events = held, events
        self._encoded = _Encoded(delivery, started.sample_rate_hz)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens in, and frames out, as OpenAI counts tokens."""
        frames = sum(chunk.frames for chunk in self.chunks)
        tokens = self.started.input_tokens
        return {"input_tokens": tokens, "output_tokens": frames, "total_tokens": tokens + frames}

    @property
    def duration_s(self) -> float:
        return self.facts.audio_s

    async def audio(self) -> AsyncGenerator[tuple[bytes, ChunkFacts | None]]:
        """Encoded bytes, and chunks as they end."""
        voice = self._encoded
        plain = self.delivery.speed == 1 and self.delivery.response_format in ("pcm", "wav")
        async for sound in self._sounds():
            samples, content = await aside(voice.push, sound.pcm, at_once=plain)
            self.facts.audio_s += samples / self.started.sample_rate_hz
            if sound.chunk is not None:
                self.chunks.append(sound.chunk)
                self.facts.chunks += 1
            if content or sound.chunk is not None:
                yield content, sound.chunk
        samples, content = await aside(voice.finish, at_once=plain)
        self.facts.audio_s += samples / self.started.sample_rate_hz
        if content:
            yield content, None

    async def plain(self) -> AsyncIterator[bytes]:
        """The sound alone."""
        try:
            async with contextlib.aclosing(self.audio()) as parts:
                async for content, _ in parts:
                    if content:
                        yield content
        except ApiError as error:
            self._note(error)
            raise

    async def server_sent(self, *, with_chunks: bool) -> AsyncIterator[bytes]:
        """Events as OpenAI's speech has them, and ours of chunks."""
        if with_chunks:
            yield _event({"type": "speech.started"} | self.about())
        try:
            async with contextlib.aclosing(self.audio()) as parts:
                async for content, chunk in parts:
                    if content:
                        yield _event({"type": "speech.audio.delta", "audio": base64.b64encode(content).decode()})
                    if chunk is not None and with_chunks:
                        yield _event({"type": "speech.chunk.done", "chunk": self.chunk_row(chunk)})
        except ApiError as error:
            self._note(error)
            yield _event({"type": "error"} | error.body())
            return
        yield _event({"type": "speech.audio.done", "usage": self.usage})

    async def described(self) -> dict[str, Any]:
        """Everything at once, the sound as base64."""
        async with contextlib.aclosing(self.audio()) as parts:
            sound = b"".join([content async for content, _ in parts])
        return self.about() | {
            "duration_s": round(self.duration_s, 6),
            "chunks": [self.chunk_row(chunk) for chunk in self.chunks],
            "status": "flagged" if any(chunk.faults for chunk in self.chunks) else "ok",
            "usage": self.usage,
            "audio": base64.b64encode(sound).decode(),
        }

    def _note(self, error: ApiError) -> None:
        """The status was sent before it was known: the log and the metrics hear of it all the same."""
        self.facts.outcome, self.facts.error = error.code or "error", error.message

    def about(self) -> dict[str, Any]:
        """What is known before the first sample."""
        return {
            "id": self.request_id,
            "format": self.delivery.response_format,
            "sample_rate": self.started.sample_rate_hz,
            "num_chunks": self.started.num_chunks,
            "warnings": list(self.started.warnings),
        }

    def chunk_row(self, chunk: ChunkFacts) -> dict[str, Any]:
        """A chunk as in the results of a batch job."""
        samples_a_s = self.started.sample_rate_hz * self.delivery.speed
        return {
            "index": chunk.index,
            "text": chunk.text,
            "speakers": list(chunk.speakers),
            "start_s": round(chunk.start_sample / samples_a_s, 6),
            "end_s": round(chunk.stop_sample / samples_a_s, 6),
            "frames": chunk.frames,
            "seed": chunk.seed,
            "attempts": chunk.attempts,
            "finish_reason": chunk.finish_reason,
            "faults": list(chunk.faults),
        }

    async def _sounds(self) -> AsyncGenerator[Sound]:
        for sound in self._held:
            yield sound
        async for event in self._events:
            if isinstance(found := _checked(event), Sound):
                yield found

    async def close(self) -> None:
        """Free the slot, wherever the answer is."""
        await self._events.aclose()


async def open_answer(
    backend: Backend, job: SpeakJob, delivery: Delivery, facts: RequestFacts, warnings: tuple[str, ...], until_s: float
) -> Answer:
    """Wait for the first samples of a job.

    Args:
        until_s: on the event loop's clock, when the whole answer must be there.

    Raises:
        ApiError: it cannot be spoken, or not now.
    """
    events = _in_time(backend.speak(job), until_s)
    try:
        started = _checked(await anext(events, None))
        if not isinstance(started, Started):
            raise Internal("the synthesizer gave no answer")
        facts.queued_s = facts.elapsed_s()
        held: list[Sound] = []
        while not any(sound.pcm for sound in held):
            event = _checked(await anext(events, None))
            if not isinstance(event, Sound):
                raise BadRequest(
                    "nothing of this text gave any sound; is there something to say in it? Another seed may help",
                    param="input",
                )
            held.append(event)
        facts.first_audio_s = facts.elapsed_s()
        known = dataclasses.replace(started, warnings=(*warnings, *started.warnings))
        return Answer(known, held, events, delivery, job.request_id, facts)
    except BaseException:
        await events.aclose()
        raise


async def _in_time(events: AsyncGenerator[Event], until_s: float) -> AsyncGenerator[Event]:
    async with contextlib.aclosing(events):
        while True:
            try:
                async with asyncio.timeout_at(until_s):
                    event = await anext(events, None)
            except TimeoutError:
                raise TooSlow("this took longer than a request may; send less text at a time") from None
            if event is None:
                return
            yield event


def _checked(event: Event | None) -> Event | None:
    if not isinstance(event, Failed):
        return event
    if event.kind == "input":
        raise BadRequest(event.message)
    if event.kind == "away":
        raise NotReady(event.message, retry_after_s=_RETRY_AWAY_S)
    raise Internal(event.message)


class _Encoded:
    """Samples at another speed and in another format."""

    def __init__(self, delivery: Delivery, sample_rate_hz: int) -> None:
        try:
            self._encoder = StreamEncoder(delivery.response_format, sample_rate_hz)
        except BadInput as error:
            raise BadRequest(str(error), param="response_format") from None
        self._speed = SpeedChanger(delivery.speed, sample_rate_hz) if delivery.speed != 1 else None

    def push(self, pcm: bytes) -> tuple[int, bytes]:
        """How many samples there are now more of, and what can be sent."""
        if not pcm:
            return 0, b""
        samples_N = np.frombuffer(pcm, np.int16)
        if self._speed is not None:
            samples_N = to_pcm16(self._speed.push(samples_N.astype(np.float32) / np.float32(32768)))
        return len(samples_N), self._encoder.write(samples_N)

    def finish(self) -> tuple[int, bytes]:
        """The rest."""
        if self._speed is None:
            return 0, self._encoder.finish()
        samples_N = to_pcm16(self._speed.finish())
        return len(samples_N), self._encoder.write(samples_N) + self._encoder.finish()


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=True)}\n\n".encode()
