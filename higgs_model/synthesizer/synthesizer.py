"""Script in, audio out: the class that batch jobs and the endpoint run in their actors.

    script ─▶ plan ─▶ for each chunk: prompt ─▶ checked take ─▶ trimmed, joined ─▶ pieces of the recording

`stream` runs any number of scripts concurrently in one event loop; the engine batches their chunks. A script's audio
depends on the script, its voices, the weights and the settings alone. Memory does not grow with a script's length:
samples are emitted as they are generated, and old takes are dropped once they no longer fit into a prompt.
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
from higgs_model.script.chunking import Chunk
from higgs_model.script.duration import FRAMES_PER_S, estimate_frames
from higgs_model.script.plan import Plan
from higgs_model.script.prompt import Tokenizer
from higgs_model.script.prompt_builder import PromptBuilder
from higgs_model.script.script import Script
from higgs_model.script.spoken_forms import Lexicon
from higgs_model.script.voices import ReferenceCodes, Voices
from higgs_model.synthesizer import segments
from higgs_model.synthesizer.loading import load_model
from higgs_model.synthesizer.records import Piece, Samples, Speech, SynthesizedChunk, Take
from higgs_model.synthesizer.settings import Pauses, SynthesisSettings
from higgs_model.synthesizer.takes import ChunkJob, EngineProtocol, TakeGenerator

_HEADING_WORDS = 12
_SENTENCE_ENDS = tuple(".!?…:;,\"'”’»)。！？؟।")


class SegmentStore(Protocol):
    """Persistent storage for the takes of finished segments; both methods may block."""

    def load(self, segment: range) -> Sequence[Take] | None:
        """Return the takes of a segment that an earlier run finished, else None."""

    def save(self, segment: range, takes: Sequence[Take]) -> None:
        """Store the takes of a segment."""


class Synthesizer:
    """Synthesizes scripts.

    Args:
        engine: runs requests; an `EngineLoop` is closed with the synthesizer.
        worker: decodes codes; closed with the synthesizer.
        references: encodes reference recordings; None: scripts with reference recordings are refused.
        max_length: maximum positions of a prompt with its answer.
    """

    def __init__(
        self,
        engine: EngineProtocol,
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
        self._takes = TakeGenerator(engine, worker, self.settings)

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
        """Load a model with its codec and tokenizer, and start an engine.

        Args:
            model: `demo`, a folder, or a Hugging Face Hub repository.
            codec: a folder or Hub repository; default: the model's own.
            voices: a voice library or its folder.
            device: default: the first GPU, else the CPU.
            dtype: default: bfloat16 on a GPU, else float32.
            code_cache: folder in which the codes of reference recordings are cached.

        Raises:
            BadCheckpoint: the model, codec or tokenizer does not exist or cannot be read.
        """
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        loaded = load_model(model, codec, chosen, dtype)
        loop = EngineLoop(Engine(loaded.model, loaded.engine_settings(engine)))
        return cls(
            loop,
            CodecWorker(loaded.codec),
            loaded.tokenizer,
            references=ReferenceCodes(loaded, loaded.codec_id, code_cache),
            voices=voices if isinstance(voices, Voices) or voices is None else Voices.from_folder(voices),
            lexicon=lexicon,
            settings=settings,
            max_length=loop.engine.settings.max_positions,
        )

    @property
    def sample_rate(self) -> int:
        """Sample rate of the output in Hz."""
        return self.worker.codec.sample_rate

    def plan(self, script: Script) -> Plan:
        """Split a script into chunks and look up its voices; blocks while voices are read.

        Raises:
            BadInput: a voice does not exist or cannot be used.
        """
        return Plan.from_script(script, self.voices, self.lexicon)

    def synthesize(self, script: Script) -> Speech:
        """Synthesize a complete recording.

        Must not be called from a running event loop; use `stream` there. Raises the same errors as `plan` and `stream`.
        """
        return asyncio.run(self._collect(script))

    async def _collect(self, script: Script) -> Speech:
        plan = await asyncio.to_thread(self.plan, script)
        pieces = [piece async for piece in self.stream(plan)]
        waveform = np.concatenate([np.empty(0, np.float32), *(piece.samples_N for piece in pieces)])
        chunks = tuple(piece.chunk for piece in pieces if piece.chunk is not None)
        return Speech(waveform, self.sample_rate, chunks, plan.warnings)

    async def stream(
        self, plan: Plan, *, live: bool = False, priority: int = 0, segment_store: SegmentStore | None = None
    ) -> AsyncGenerator[Piece]:
        """Yield the recording piece by piece, in order.

        Args:
            live: yield samples while they are generated; each chunk then has one take, with or without faults.
            priority: priority of the engine's requests; lower values run first.
            segment_store: stores the takes of finished segments, so that a later run can reuse them.

        Raises:
            BadInput: the references and a chunk leave no room for an answer, or the engine refuses the sampling
                parameters.
            EngineStopped: the engine has failed.
        """
        prompt_builder = await asyncio.to_thread(
            PromptBuilder,
            plan,
            self._tokenizer,
            self._references,
            max_length=self._max_length,
            num_codebooks=self.worker.codec.num_codebooks,
        )
        timeline = Timeline(self.sample_rate, fade_s=self.settings.fade_s, room_tone_dbfs=self.settings.room_tone_dbfs)
        if plan.chunks and plan.chunks[0].silence_before_ms:
            yield Piece(timeline.pause(self._to_samples(plan.chunks[0].silence_before_ms)))
        start = timeline.position
        run = _Run(plan, prompt_builder, live, priority, segment_store)
        async with contextlib.aclosing(self._generate(run)) as events:
            async for event in events:
                if not isinstance(event, Take):
                    yield Piece(timeline.push(event))
                    continue
                chunk = plan.chunks[event.index]
                rest, stop = timeline.end_take(), timeline.position
                yield Piece(rest, self._describe_chunk(plan, chunk, event, start, stop))
                pause_ms = pause_after_ms(chunk, self.settings.pauses)
                if pause_ms:
                    yield Piece(timeline.pause(self._to_samples(pause_ms)))
                start = timeline.position

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def metrics(self) -> dict[str, float]:
        """Return the engine's metrics; empty if the engine has none."""
        return self.engine.engine.snapshot() if isinstance(self.engine, EngineLoop) else {}

    def close(self) -> None:
        """Stop the engine and the codec worker."""
        if isinstance(self.engine, EngineLoop):
            self.engine.close()
        self.worker.close()

    # ------------------------------------------------------------------ takes, in order

    def segments(self, plan: Plan) -> list[range]:
        """Return the ranges of chunks that are synthesized in parallel."""
        expected_s = [estimate_frames(chunk.prompt_text).expected_frames / FRAMES_PER_S for chunk in plan.chunks]
        return segments.split_into_segments(plan.chunks, expected_s, self.settings.segment_s)

    async def _generate(self, run: _Run) -> AsyncGenerator[Samples | Take]:
        """Yield the samples of each chunk, followed by its take, in order."""
        ranges = self.segments(run.plan)
        if len(ranges) <= 1 or run.live:
            for segment in ranges:
                async with contextlib.aclosing(self._generate_segment(run, segment)) as events:
                    async for event in events:
                        yield event
            return
        limit = asyncio.Semaphore(self.settings.segments_at_once)
        tasks = [asyncio.create_task(self._load_or_generate_takes(run, segment, limit)) for segment in ranges]
        try:
            for task in tasks:
                for take in await task:
                    # Decode as late as possible, because codes take a hundredth of the memory of samples.
                    yield await self._takes.decode(take)
                    yield take
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _load_or_generate_takes(self, run: _Run, segment: range, limit: asyncio.Semaphore) -> Sequence[Take]:
        """Return the takes of a segment, from the store if it has them."""
        async with limit:
            stored = None if run.segment_store is None else await asyncio.to_thread(run.segment_store.load, segment)
            if stored is not None:
                return stored
            takes = [event async for event in self._generate_segment(run, segment) if isinstance(event, Take)]
            if run.segment_store is not None:
                await asyncio.to_thread(run.segment_store.save, segment, takes)
            return takes

    async def _generate_segment(self, run: _Run, segment: range) -> AsyncGenerator[Samples | Take]:
        history: list[NDArray[np.int64] | None] = [None] * segment.start
        for index in segment:
            job = self._build_job(run, index, history)
            if run.live:
                async with contextlib.aclosing(self._takes.generate_live(job)) as events:
                    async for event in events:
                        yield event
                        if isinstance(event, Take):
                            take = event
            else:
                take, samples_N = await self._takes.generate_best(job)
                yield samples_N
                yield take
            # Faulty takes stay out of the context, because the model would imitate them.
            history.append(take.codes_KT.astype(np.int64) if take.passed_checks else None)
            _drop_old_takes(history, self._max_length)

    def _build_job(self, run: _Run, index: int, history: Sequence[NDArray[np.int64] | None]) -> ChunkJob:
        script, chunk = run.plan.script, run.plan.chunks[index]
        return ChunkJob(
            index=index,
            text=chunk.text,
            prompt=run.prompt_builder.build(index, history),
            sampling=SamplingParams(**script.sampling()),
            seed=self.settings.seed if script.seed is None else script.seed,
            priority=run.priority,
            language=script.language,
        )

    def _to_samples(self, milliseconds: int) -> int:
        return milliseconds * self.sample_rate // 1000

    def _describe_chunk(self, plan: Plan, chunk: Chunk, take: Take, start: int, stop: int) -> SynthesizedChunk:
        speakers = tuple(plan.script.speaker_name(tag) for tag in chunk.speakers)
        return SynthesizedChunk(chunk.index, chunk.text, speakers, start, stop, self.sample_rate, take)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A script being synthesized."""

    plan: Plan
    prompt_builder: PromptBuilder
    live: bool
    priority: int
    segment_store: SegmentStore | None


def pause_after_ms(chunk: Chunk, pauses: Pauses) -> int:
    """Return the pause after a chunk in milliseconds."""
    if chunk.silence_after_ms or chunk.boundary in ("pause", "end"):
        return chunk.silence_after_ms
    if chunk.boundary == "paragraph" and _is_heading(chunk.text):
        return pauses.heading
    return {"sentence": pauses.sentence, "paragraph": pauses.paragraph, "turn": pauses.turn}[chunk.boundary]


def _is_heading(text: str) -> bool:
    """Return whether a text is a short line without sentence-final punctuation."""
    return "\n" not in text and len(text.split()) <= _HEADING_WORDS and not text.endswith(_SENTENCE_ENDS)


def _drop_old_takes(history: list[NDArray[np.int64] | None], max_length: int) -> None:
    """Drop takes that cannot be in a prompt any more, because later ones exceed its maximum length."""
    length = 0
    for index in range(len(history) - 1, -1, -1):
        codes_KT = history[index]
        if length > max_length:
            if codes_KT is None:
                return
            history[index] = None
        elif codes_KT is not None:
            length += codes_KT.shape[1]
