"""Script in, audio out: the one class that batch jobs and the endpoint hold in their actors.

    plan the script ─▶ for each chunk: prompt ─▶ take, gated ─▶ trimmed, joined ─▶ pieces of the recording

`speak` runs any number of scripts at once in one event loop; their chunks meet in the engine. What a script sounds
like follows from the script, its voices, the weights and the settings alone. Memory does not grow with a script's
length: samples go out as they are made, and of old takes only those are kept that the model can still hear.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from higgs_model.audio.timeline import Timeline
from higgs_model.engine.codec_worker import CodecWorker
from higgs_model.engine.engine import Engine
from higgs_model.engine.loop import EngineLoop
from higgs_model.engine.settings import EngineSettings
from higgs_model.sampling import SamplingParams
from higgs_model.script.budget import FRAMES_PER_S, frame_budget
from higgs_model.script.chunking import Chunk
from higgs_model.script.plan import Plan, Prompter
from higgs_model.script.prompt import Tokenizer
from higgs_model.script.script import Script
from higgs_model.script.spoken import Lexicon
from higgs_model.script.voices import ReferenceCodes, Voices
from higgs_model.synthesizer import segments
from higgs_model.synthesizer.loading import Parts, load
from higgs_model.synthesizer.records import Piece, Samples, Speech, SpokenChunk, Take
from higgs_model.synthesizer.settings import Pauses, SynthesisSettings
from higgs_model.synthesizer.takes import ChunkJob, Generates, TakeMaker

_HEADING_WORDS = 12
_SENTENCE_ENDS = tuple(".!?…:;,\"'”’»)。！？؟।")


class SegmentStore(Protocol):
    """Where the takes of finished segments outlive the worker; both methods may block."""

    def load(self, segment: range) -> Sequence[Take] | None:
        """The takes of a segment, if it was finished before."""

    def save(self, segment: range, takes: Sequence[Take]) -> None:
        """Keep them."""


class Synthesizer:
    """Speaks scripts.

    Args:
        engine: runs requests; an `EngineLoop` is closed with the synthesizer.
        worker: decodes; closed with the synthesizer.
        references: codes of reference recordings; None: recordings are refused.
        max_length: positions of a prompt and its answer together.
    """

    def __init__(
        self,
        engine: Generates,
        worker: CodecWorker,
        tokenizer: Tokenizer,
        *,
        references: ReferenceCodes | None,
        voices: Voices | None = None,
        lexicon: Lexicon | None = None,
        settings: SynthesisSettings | None = None,
        max_length: int = 8192,
    ) -> None:
        self.engine, self.worker = engine, worker
        self.settings = settings or SynthesisSettings()
        self.voices, self.lexicon = voices or Voices(), lexicon
        self._tokenizer, self._references, self._max_length = tokenizer, references, max_length
        self._takes = TakeMaker(engine, worker, self.settings)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        codec: str | Path | None = None,
        *,
        voices: Voices | str | Path | None = None,
        lexicon: Lexicon | None = None,
        settings: SynthesisSettings | None = None,
        engine: EngineSettings | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        code_cache: str | Path | None = None,
    ) -> Self:
        """Load everything that speaks.

        Args:
            model: `demo`, a folder, or a repository on the hub.
            codec: a folder or a repository; by default the one that belongs to the model.
            voices: a library, or its folder.
            device: by default the first GPU, else the CPU.
            dtype: by default bfloat16 on a GPU, else float32.
            code_cache: folder in which codes of references outlive the process.
        """
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        parts: Parts = load(model, codec, chosen, dtype)
        loop = EngineLoop(Engine(parts.model, parts.engine_settings(engine)))
        return cls(
            loop,
            CodecWorker(parts.codec),
            parts.tokenizer,
            references=ReferenceCodes(parts, parts.codec_id, code_cache),
            voices=voices if isinstance(voices, Voices) or voices is None else Voices.from_folder(voices),
            lexicon=lexicon,
            settings=settings,
            max_length=loop.engine.settings.max_positions,
        )

    @property
    def sample_rate(self) -> int:
        """Hz, of everything that comes out."""
        return self.worker.codec.sample_rate

    def plan(self, script: Script) -> Plan:
        """What will be said, by whom; blocks while voices are read.

        Raises:
            BadInput: a voice is not there, or cannot be used.
        """
        return Plan.of(script, self.voices, self.lexicon)

    def synthesize(self, script: Script) -> Speech:
        """The whole recording at once; not to be called from an event loop."""
        return asyncio.run(self._collected(script))

    async def _collected(self, script: Script) -> Speech:
        plan = await asyncio.to_thread(self.plan, script)
        pieces = [piece async for piece in self.speak(plan)]
        waveform = np.concatenate([np.empty(0, np.float32), *(piece.samples_N for piece in pieces)])
        chunks = tuple(piece.chunk for piece in pieces if piece.chunk is not None)
        return Speech(waveform, self.sample_rate, chunks, plan.warnings)

    async def speak(
        self, plan: Plan, *, live: bool = False, priority: int = 0, kept: SegmentStore | None = None
    ) -> AsyncGenerator[Piece]:
        """The recording piece by piece, in order.

        Args:
            live: give samples while they are being made. Each chunk then has one take, whatever is wrong with it.
            priority: lower goes first in the engine.
            kept: takes of finished segments, from an earlier run and for a later one.

        Raises:
            BadInput: references and a chunk leave no room for an answer; or the engine refuses the sampling.
            EngineStopped: the engine is broken.
        """
        prompter = await asyncio.to_thread(
            Prompter,
            plan,
            self._tokenizer,
            self._references,
            max_length=self._max_length,
            num_codebooks=self.worker.codec.num_codebooks,
        )
        timeline = Timeline(self.sample_rate, fade_s=self.settings.fade_s, room_tone_dbfs=self.settings.room_tone_dbfs)
        if plan.chunks and plan.chunks[0].silence_before_ms:
            yield Piece(timeline.pause(self._samples(plan.chunks[0].silence_before_ms)))
        start = timeline.position
        async with contextlib.aclosing(self._events(_Spoken(plan, prompter, live, priority, kept))) as events:
            async for event in events:
                if not isinstance(event, Take):
                    yield Piece(timeline.push(event))
                    continue
                chunk = plan.chunks[event.index]
                rest, stop = timeline.end_take(), timeline.position
                yield Piece(rest, self._spoken(plan, chunk, event, start, stop))
                pause_ms = pause_after_ms(chunk, self.settings.pauses)
                if pause_ms:
                    yield Piece(timeline.pause(self._samples(pause_ms)))
                start = timeline.position

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, whatever stands in it."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def numbers(self) -> dict[str, float]:
        """What the engine has done so far; nothing of an engine that does not say."""
        return self.engine.engine.snapshot() if isinstance(self.engine, EngineLoop) else {}

    def close(self) -> None:
        """Stop the engine and the codec worker."""
        if isinstance(self.engine, EngineLoop):
            self.engine.close()
        self.worker.close()

    # ------------------------------------------------------------------ takes, in order

    def segments(self, plan: Plan) -> list[range]:
        """Ranges of chunks that are spoken side by side."""
        expected_s = [frame_budget(chunk.prompt_text).expected / FRAMES_PER_S for chunk in plan.chunks]
        return segments.cut(plan.chunks, expected_s, self.settings.segment_s)

    async def _events(self, spoken: _Spoken) -> AsyncGenerator[Samples | Take]:
        """Samples of each chunk and then its take, chunk after chunk."""
        ranges = self.segments(spoken.plan)
        if len(ranges) <= 1 or spoken.live:
            for segment in ranges:
                async with contextlib.aclosing(self._segment(spoken, segment)) as events:
                    async for event in events:
                        yield event
            return
        room = asyncio.Semaphore(self.settings.segments_at_once)
        tasks = [asyncio.create_task(self._aside(spoken, segment, room)) for segment in ranges]
        try:
            for task in tasks:
                for take in await task:
                    # Kept as codes until its turn comes: an hour of them is a hundredth of an hour of samples.
                    yield await self._takes.decode(take)
                    yield take
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _aside(self, spoken: _Spoken, segment: range, room: asyncio.Semaphore) -> Sequence[Take]:
        """The takes of a segment, from an earlier run if there was one."""
        async with room:
            found = None if spoken.kept is None else await asyncio.to_thread(spoken.kept.load, segment)
            if found is not None:
                return found
            takes = [event async for event in self._segment(spoken, segment) if isinstance(event, Take)]
            if spoken.kept is not None:
                await asyncio.to_thread(spoken.kept.save, segment, takes)
            return takes

    async def _segment(self, spoken: _Spoken, segment: range) -> AsyncGenerator[Samples | Take]:
        heard: list[NDArray[np.int64] | None] = [None] * segment.start
        for index in segment:
            job = self._job(spoken, index, heard)
            if spoken.live:
                async with contextlib.aclosing(self._takes.live(job)) as events:
                    async for event in events:
                        yield event
                        if isinstance(event, Take):
                            take = event
            else:
                take, samples_N = await self._takes.make(job)
                yield samples_N
                yield take
            # What went wrong once is not to be imitated.
            heard.append(take.codes_KT.astype(np.int64) if take.good else None)
            _forget(heard, self._max_length)

    def _job(self, spoken: _Spoken, index: int, heard: Sequence[NDArray[np.int64] | None]) -> ChunkJob:
        script, chunk = spoken.plan.script, spoken.plan.chunks[index]
        return ChunkJob(
            index=index,
            text=chunk.text,
            prompt=spoken.prompter.prompt(index, heard),
            sampling=SamplingParams(**script.sampling()),
            seed=self.settings.seed if script.seed is None else script.seed,
            priority=spoken.priority,
            language=script.language,
        )

    def _samples(self, milliseconds: int) -> int:
        return milliseconds * self.sample_rate // 1000

    def _spoken(self, plan: Plan, chunk: Chunk, take: Take, start: int, stop: int) -> SpokenChunk:
        speakers = tuple(plan.script.speaker_name(tag) for tag in chunk.speakers)
        return SpokenChunk(chunk.index, chunk.text, speakers, start, stop, self.sample_rate, take)


@dataclasses.dataclass(frozen=True)
class _Spoken:
    """A script under way."""

    plan: Plan
    prompter: Prompter
    live: bool
    priority: int
    kept: SegmentStore | None


def pause_after_ms(chunk: Chunk, pauses: Pauses) -> int:
    """Milliseconds of room tone after a chunk."""
    if chunk.silence_after_ms or chunk.boundary in ("pause", "end"):
        return chunk.silence_after_ms
    if chunk.boundary == "paragraph" and _is_heading(chunk.text):
        return pauses.heading
    return {"sentence": pauses.sentence, "paragraph": pauses.paragraph, "turn": pauses.turn}[chunk.boundary]


def _is_heading(text: str) -> bool:
    """A short line of its own that ends like no sentence does."""
    return "\n" not in text and len(text.split()) <= _HEADING_WORDS and not text.endswith(_SENTENCE_ENDS)


def _forget(heard: list[NDArray[np.int64] | None], max_length: int) -> None:
    """Let go of takes so old that those after them fill the model's length alone."""
    length = 0
    for index in range(len(heard) - 1, -1, -1):
        codes_KT = heard[index]
        if length > max_length:
            if codes_KT is None:
                return
            heard[index] = None
        elif codes_KT is not None:
            length += codes_KT.shape[1]
