"""Runs requests on a synthesizer: the work of a replica, without Ray.

In: a `SynthesisRequest`. Out: its events. Failures become `Failed` events; closing the generator frees the engine's
slot at once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Protocol

from pydantic import ValidationError

from higgs_model.audio.streams import Pcm
from higgs_model.audio.writers import to_pcm16
from higgs_model.engine.codec_worker import WorkerStopped
from higgs_model.engine.loop import EngineStopped
from higgs_model.errors import BadInput, HiggsError
from higgs_model.script.plan import Plan
from higgs_model.script.script import Script, error_messages
from higgs_model.script.voices import Voice, Voices
from higgs_model.synthesizer.records import Piece, SynthesizedChunk
from serve.http.background import is_cheap_to_plan, run_in_thread
from serve.speech.events import AudioBlock, ChunkMetadata, Event, Failed, Started, SynthesisRequest
from serve.voices.voice_library import VoiceLibrary

logger = logging.getLogger(__name__)

PRIORITY = -1
"""Lower values run first: requests go before rows of batch jobs that share the engine."""


class SynthesizerProtocol(Protocol):
    """The interface of `Synthesizer` that the endpoint uses."""

    @property
    def sample_rate(self) -> int:
        """Sample rate of the audio in Hz."""

    def stream(self, plan: Plan, *, live: bool = False, priority: int = 0) -> AsyncGenerator[Piece]:
        """Yield the recording in pieces."""

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""

    def metrics(self) -> dict[str, float]:
        """Return the engine's metrics."""

    def close(self) -> None:
        """Release all resources."""


class RequestSynthesizer:
    """Runs requests on one synthesizer with the voices of a library.

    Args:
        seed: default for requests without one.

    Attributes:
        engine_error: why the engine stopped; None while it works.
    """

    def __init__(self, synthesizer: SynthesizerProtocol, library: VoiceLibrary | None, seed: int) -> None:
        self.synthesizer, self._library, self._seed = synthesizer, library, seed
        self.engine_error: BaseException | None = None

    def warm_up(self) -> None:
        """Load lazily initialized resources, such as the language classifier, before the first request."""
        Plan.from_script(Script.model_validate({"id": "warm-up", "text": "Good morning."}), Voices())

    async def stream(self, request: SynthesisRequest) -> AsyncGenerator[Event]:
        """Yield the events of a request."""
        try:
            # Reading voices may block; planning a short text without voices does not.
            needs_voices = request.reference is not None or bool({"voice", "voices"} & request.row.keys())
            plan = await run_in_thread(self._plan, request, inline=not needs_voices and is_cheap_to_plan(request.row))
            num_tokens = self.synthesizer.count_tokens(plan.script.tagged_text())
            yield Started(self.synthesizer.sample_rate, len(plan.chunks), num_tokens, plan.warnings)
            stream = self.synthesizer.stream(plan, live=request.live, priority=PRIORITY)
            async with contextlib.aclosing(stream) as pieces:
                async for piece in pieces:
                    if len(piece.samples_N) or piece.chunk is not None:
                        pcm: Pcm = to_pcm16(piece.samples_N)
                        yield AudioBlock(pcm.tobytes(), None if piece.chunk is None else _chunk_metadata(piece.chunk))
        except HiggsError as error:
            yield Failed("input", str(error))
        except (EngineStopped, WorkerStopped) as error:
            self.engine_error = error
            logger.error("request %s: the engine failed", request.request_id, exc_info=error)
            yield Failed("unavailable", "the synthesizer failed and is being replaced")
        except OSError as error:
            logger.error("request %s: the voice library cannot be read: %s", request.request_id, error)
            yield Failed("unavailable", "the voice library cannot be read at the moment")
        except Exception as error:
            logger.error("request %s failed", request.request_id, exc_info=error)
            yield Failed("internal", "internal error; the log has the details under this request's id")

    def _plan(self, request: SynthesisRequest) -> Plan:
        try:
            script = Script.model_validate(request.row).with_defaults({"seed": self._seed})
        except ValidationError as error:
            raise BadInput("; ".join(error_messages(error))) from None
        return Plan.from_script(script, self._load_voices(script, request))

    def _load_voices(self, script: Script, request: SynthesisRequest) -> Voices:
        names = {choice.name for choice in script.voice_choices() if choice.profile is choice.description is None}
        library = Voices() if self._library is None else self._library.voices(names)
        return library if request.reference is None else _VoicesWithReference(library, request.reference)


class _VoicesWithReference(Voices):
    """A library, with the reference recording of one request as its only one-off voice."""

    def __init__(self, library: Voices, recording: bytes) -> None:
        super().__init__()
        self._library, self._reference = library, recording

    def recording(self, name: str) -> Voice:
        return self._library.recording(name)

    def profile(self, name: str) -> str:
        return self._library.profile(name)

    def load_reference(self, source: str, transcript: str | None) -> Voice:
        return Voice(self._reference, (transcript or "").strip() or None)


def _chunk_metadata(chunk: SynthesizedChunk) -> ChunkMetadata:
    attempt = chunk.take.attempt
    return ChunkMetadata(
        chunk.index,
        chunk.text,
        chunk.speakers,
        chunk.start_sample,
        chunk.stop_sample,
        attempt.frames,
        attempt.seed,
        len(chunk.take.attempts),
        attempt.finish_reason,
        attempt.faults,
    )
