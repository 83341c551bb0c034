"""A synthesizer answering jobs: everything that the replica does, without Ray.

In: a `SpeakJob`. Out: its events. Whatever goes wrong with the script becomes `Failed`; closing the generator lets the
engine go on with others at once.
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
from higgs_model.script.script import Script, faults
from higgs_model.script.voices import Voice, Voices
from higgs_model.synthesizer.records import Piece, SpokenChunk
from serve.http.background import aside, is_short
from serve.speech.events import ChunkFacts, Event, Failed, Sound, SpeakJob, Started
from serve.voices.voice_library import VoiceLibrary

logger = logging.getLogger(__name__)

PRIORITY = -1
"""Somebody waits for it: before the rows of batch jobs that share the engine."""


class Speaks(Protocol):
    """What is asked of a `Synthesizer`, or of something that stands for one."""

    @property
    def sample_rate(self) -> int:
        """Hz."""

    def speak(self, plan: Plan, *, live: bool = False, priority: int = 0) -> AsyncGenerator[Piece]:
        """The recording, piece by piece."""

    def count_tokens(self, text: str) -> int:
        """Tokens of a text."""

    def numbers(self) -> dict[str, float]:
        """What its engine has done."""

    def close(self) -> None:
        """Let go of everything."""


class Speaker:
    """One synthesizer and the voices that it reads.

    Args:
        seed: of rows that give none.
    """

    def __init__(self, speaks: Speaks, library: VoiceLibrary | None, seed: int) -> None:
        self.speaks, self._library, self._seed = speaks, library, seed
        self.broken: BaseException | None = None

    def warm_up(self) -> None:
        """Load what the first text would wait for, such as the classifier of languages."""
        Plan.of(Script.model_validate({"id": "warm-up", "text": "Good morning."}), Voices())

    async def answer(self, job: SpeakJob) -> AsyncGenerator[Event]:
        """The events of a job."""
        try:
            # Voices are read from where they are kept; a text alone is soon planned.
            alone = job.reference is None and not {"voice", "voices"} & job.row.keys()
            plan = await aside(self._plan, job, at_once=alone and is_short(job.row))
            text = plan.script.tagged_text()
            yield Started(self.speaks.sample_rate, len(plan.chunks), self.speaks.count_tokens(text), plan.warnings)
            async with contextlib.aclosing(self.speaks.speak(plan, live=job.live, priority=PRIORITY)) as pieces:
                async for piece in pieces:
                    if len(piece.samples_N) or piece.chunk is not None:
                        pcm: Pcm = to_pcm16(piece.samples_N)
                        yield Sound(pcm.tobytes(), None if piece.chunk is None else _facts(piece.chunk))
        except HiggsError as error:
            yield Failed("input", str(error))
        except (EngineStopped, WorkerStopped) as error:
            self.broken = error
            logger.error("request %s: the engine broke", job.request_id, exc_info=error)
            yield Failed("away", "the synthesizer broke while it spoke; it is being replaced")
        except OSError as error:
            logger.error("request %s: %s", job.request_id, error)
            yield Failed("away", "the voices cannot be read now")
        except Exception as error:
            logger.error("request %s", job.request_id, exc_info=error)
            yield Failed("internal", "something went wrong here; it is in the log under this request's id")

    def _plan(self, job: SpeakJob) -> Plan:
        try:
            script = Script.model_validate(job.row).with_defaults({"seed": self._seed})
        except ValidationError as error:
            raise BadInput("; ".join(faults(error))) from None
        return Plan.of(script, self._voices(script, job))

    def _voices(self, script: Script, job: SpeakJob) -> Voices:
        named = {choice.name for choice in script.voice_choices() if choice.profile is choice.description is None}
        library = Voices() if self._library is None else self._library.voices(named)
        return library if job.reference is None else _WithRecording(library, job.reference)


class _WithRecording(Voices):
    """A library, and one recording that came with a request."""

    def __init__(self, library: Voices, recording: bytes) -> None:
        super().__init__()
        self._library, self._brought = library, recording

    def recording(self, name: str) -> Voice:
        return self._library.recording(name)

    def profile(self, name: str) -> str:
        return self._library.profile(name)

    def one_off(self, source: str, transcript: str | None) -> Voice:
        return Voice(self._brought, (transcript or "").strip() or None)


def _facts(chunk: SpokenChunk) -> ChunkFacts:
    attempt = chunk.take.attempt
    return ChunkFacts(
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
