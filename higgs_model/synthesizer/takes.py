"""Generates takes of a chunk, checks them, and retries faulty ones.

In: a `ChunkJob`. Out: the best `Take` with its trimmed samples. The seed of each attempt is derived from the script's
seed, the chunk and the attempt, so a chunk's takes are the same in every run. `generate_live` yields the samples
of the first take while it is generated, and therefore cannot retry it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import re
import uuid
from collections.abc import AsyncGenerator
from typing import Protocol

import numpy as np

from higgs_model.audio.silence_trimming import SilenceTrimmer
from higgs_model.audio.take_checks import ExpectedTake, find_faults, measure_take, severity
from higgs_model.engine.codec_worker import CodecWorker
from higgs_model.engine.request import FinishReason, Request, Update
from higgs_model.sampling import SamplingParams
from higgs_model.script.duration import FRAMES_PER_S, estimate_frames
from higgs_model.script.prompt import Prompt
from higgs_model.synthesizer.records import Samples, Take, TakeMetadata
from higgs_model.synthesizer.settings import SynthesisSettings

_FRAMES_PER_UPDATE, _LIVE_FRAMES_PER_UPDATE = 25, 8
"""Live streams get frames as soon as the codec can decode them."""
_TAGS = re.compile(r"<SE(?:_[se])?>[^<]{0,80}</SE(?:_[se])?>|\[SPEAKER\d+\]|\s+")
_ALPHABETIC = re.compile(r"[^\W\d_\u0590-\u08ff\u0900-\u1fff\u2e80-\uffff]")
"""Letters of scripts in which a letter is roughly a phoneme, such as Latin, Greek and Cyrillic."""
_ALPHABETIC_SHARE = 0.75
_FAULT_OF_REASON = {
    FinishReason.LENGTH: "not_ended",
    FinishReason.LOOP: "loop",
    FinishReason.SILENCE: "inner_silence",
    FinishReason.INVALID: "invalid",
    FinishReason.STALLED: "not_ended",
}


class EngineProtocol(Protocol):
    """The asyncio interface of an engine, implemented by `EngineLoop`."""

    def generate(self, request: Request) -> AsyncGenerator[Update]:
        """Yield the updates of a request; the last one has a finish reason."""


@dataclasses.dataclass(frozen=True)
class ChunkJob:
    """A chunk to synthesize, with its prompt and sampling parameters."""

    index: int
    text: str
    prompt: Prompt
    sampling: SamplingParams
    seed: int
    priority: int = 0
    language: str | None = None


def derive_seed(seed: int, chunk: int, attempt: int) -> int:
    """Derive the seed of a take: a 63-bit hash of script seed, chunk and attempt."""
    digest = hashlib.blake2b(f"{seed}/{chunk}/{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def estimate_take(text: str) -> ExpectedTake:
    """Return the number of characters and the bounds of the duration expected for a text."""
    spoken = _TAGS.sub("", text)
    alphabetic = len(_ALPHABETIC.findall(spoken))
    has_char_rate = len(spoken) > 0 and alphabetic >= _ALPHABETIC_SHARE * len(spoken) and "<SE" not in text
    budget = estimate_frames(text)
    return ExpectedTake(
        len(spoken) if has_char_rate else None, budget.min_frames / FRAMES_PER_S, budget.max_frames / FRAMES_PER_S
    )


async def decode_take(take: Take, worker: CodecWorker, settings: SynthesisSettings) -> Samples:
    """Decode and trim a take; needs no engine."""
    clip, trimmer = worker.open_clip(), SilenceTrimmer(worker.codec.sample_rate, settings.silence)
    parts = [
        trimmer.push(await clip.push(take.codes_KT.astype(np.int64))),
        trimmer.push(await clip.finish()),
        trimmer.finish(),
    ]
    return np.concatenate(parts)


class TakeGenerator:
    """Generates takes with one engine and one codec."""

    def __init__(self, engine: EngineProtocol, worker: CodecWorker, settings: SynthesisSettings) -> None:
        self._engine, self._worker, self._settings = engine, worker, settings
        self._sample_rate_hz = worker.codec.sample_rate
        self._ids = (f"{uuid.uuid4().hex[:8]}-{number}" for number in itertools.count())

    async def generate_best(self, job: ChunkJob) -> tuple[Take, Samples]:
        """Return the best of up to `attempts` takes, and its samples; stop at the first one without faults."""
        best: tuple[int, Take, Samples] | None = None
        attempts: list[TakeMetadata] = []
        for number in range(self._settings.attempts):
            parts: list[Samples] = []
            async for event in self._generate_take(job, number, _FRAMES_PER_UPDATE):
                if not isinstance(event, Take):
                    parts.append(event)
                    continue
                samples = np.concatenate([np.empty(0, np.float32), *parts])
                take = await self._check_transcript(event, samples, job)
                attempts.append(take.attempt)
                total_severity = severity(take.attempt.faults)
                if best is None or total_severity < best[0]:
                    best = total_severity, dataclasses.replace(take, attempt_index=number), samples
            if best is not None and best[0] == 0:
                break
        assert best is not None  # noqa: S101  (every attempt ends with a take, and there is at least one)
        return dataclasses.replace(best[1], attempts=tuple(attempts)), best[2]

    def generate_live(self, job: ChunkJob) -> AsyncGenerator[Samples | Take]:
        """Yield the samples of the first take as they are generated, then the take itself."""
        return self._generate_take(job, 0, _LIVE_FRAMES_PER_UPDATE)

    async def decode(self, take: Take) -> Samples:
        """Decode an existing take; on the same CPU the samples are bit-identical to those from its generation."""
        return await decode_take(take, self._worker, self._settings)

    def _create_trimmer(self) -> SilenceTrimmer:
        return SilenceTrimmer(self._sample_rate_hz, self._settings.silence)

    async def _generate_take(self, job: ChunkJob, number: int, stream_every: int) -> AsyncGenerator[Samples | Take]:
        seed = derive_seed(job.seed, job.index, number)
        request = Request(
            id=next(self._ids),
            input_ids=tuple(job.prompt.token_ids),
            clips=job.prompt.codes,
            sampling=job.sampling,
            seed=seed,
            max_frames=job.prompt.max_frames,
            priority=job.priority,
            stream_every=stream_every,
        )
        clip, trimmer = self._worker.open_clip(), self._create_trimmer()
        frames, parts, reason = [], [], FinishReason.INVALID
        async with contextlib.aclosing(self._engine.generate(request)) as updates:
            async for update in updates:
                frames.append(update.frames)
                reason = update.finish_reason or reason
                parts.append(trimmer.push(await clip.push(update.frames)))
                yield parts[-1]
        for rest in (trimmer.push(await clip.finish()), trimmer.finish()):
            parts.append(rest)
            yield rest
        # Takes stay in memory, so store them as int16 instead of int64.
        codes_KT = np.concatenate(frames, axis=1).astype(np.int16)
        faults = await asyncio.to_thread(self._find_faults, np.concatenate(parts), trimmer, reason, job.text)
        attempt = TakeMetadata(seed, codes_KT.shape[1], reason.value, tuple(dict.fromkeys(faults)))
        yield Take(job.index, codes_KT, (attempt,), attempt_index=0)

    def _find_faults(self, samples_N: Samples, trimmer: SilenceTrimmer, reason: FinishReason, text: str) -> list[str]:
        limits, rate = self._settings.limits, self._sample_rate_hz
        faults = find_faults(
            measure_take(samples_N, rate, limits.silence_threshold_dbfs),
            estimate_take(text),
            head_silence_s=trimmer.head_samples / rate,
            tail_silence_s=trimmer.tail_samples / rate,
            limits=limits,
        )
        return ([_FAULT_OF_REASON[reason]] if reason in _FAULT_OF_REASON else []) + faults

    async def _check_transcript(self, take: Take, samples_N: Samples, job: ChunkJob) -> Take:
        """Run the transcript check on a take without faults, and add its findings."""
        check = self._settings.check
        if check is None or not take.passed_checks:
            return take
        notes = await asyncio.to_thread(check, samples_N, self._sample_rate_hz, job.text, job.language)
        if not notes:
            return take
        attempt = dataclasses.replace(take.attempt, faults=("text",), notes=tuple(notes))
        return dataclasses.replace(take, attempts=(attempt,))
