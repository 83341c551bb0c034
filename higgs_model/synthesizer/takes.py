"""Takes of one chunk: made, heard, and made again when they are not good.

A `ChunkJob` in; the best `Take` out, with its trimmed samples. Each attempt has a seed of its own, which follows from
the script's seed, the chunk and the attempt, so that a chunk's takes are the same in every run. `live` gives the
samples of a first take while it is being made, and so can only say afterwards what is wrong with it.
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

from higgs_model.audio.edges import EdgeTrimmer
from higgs_model.audio.gate import Wanted, faults, measure, severity
from higgs_model.engine.codec_worker import CodecWorker
from higgs_model.engine.request import FinishReason, Request, Update
from higgs_model.sampling import SamplingParams
from higgs_model.script.budget import FRAMES_PER_S, frame_budget
from higgs_model.script.prompt import Prompt
from higgs_model.synthesizer.records import Attempt, Samples, Take
from higgs_model.synthesizer.settings import SynthesisSettings

_FRAMES_AN_UPDATE, _LIVE_FRAMES_AN_UPDATE = 25, 8
"""Where somebody listens, frames come as soon as the codec can do anything with them."""
_TAGS = re.compile(r"<SE(?:_[se])?>[^<]{0,80}</SE(?:_[se])?>|\[SPEAKER\d+\]|\s+")
_ALPHABETIC = re.compile(r"[^\W\d_\u0590-\u08ff\u0900-\u1fff\u2e80-\uffff]")
"""Letters of writing in which a letter is about a sound: Latin, Greek, Cyrillic and their like."""
_ALPHABETIC_SHARE = 0.75
_FAULT_OF = {
    FinishReason.LENGTH: "not_ended",
    FinishReason.LOOP: "loop",
    FinishReason.SILENCE: "inner_silence",
    FinishReason.INVALID: "invalid",
    FinishReason.STALLED: "not_ended",
}


class Generates(Protocol):
    """An engine as the asyncio world sees it: `EngineLoop`, or something that stands for one."""

    def generate(self, request: Request) -> AsyncGenerator[Update]:
        """Updates of a request, the last one with its finish reason."""


@dataclasses.dataclass(frozen=True)
class ChunkJob:
    """A chunk to be spoken: what the model is given, and what follows for its sound."""

    index: int
    text: str
    prompt: Prompt
    sampling: SamplingParams
    seed: int
    priority: int = 0
    language: str | None = None


def derived_seed(seed: int, chunk: int, attempt: int) -> int:
    """The seed of one take: 63 bits that differ for every script's seed, chunk and attempt."""
    digest = hashlib.blake2b(f"{seed}/{chunk}/{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def wanted(text: str) -> Wanted:
    """What the length of a take should be, from its text."""
    spoken = _TAGS.sub("", text)
    alphabetic = len(_ALPHABETIC.findall(spoken))
    rated = len(spoken) > 0 and alphabetic >= _ALPHABETIC_SHARE * len(spoken) and "<SE" not in text
    budget = frame_budget(text)
    return Wanted(len(spoken) if rated else None, budget.least / FRAMES_PER_S, budget.most / FRAMES_PER_S)


async def decode_take(take: Take, worker: CodecWorker, settings: SynthesisSettings) -> Samples:
    """The trimmed samples of a take: the codec alone, no engine."""
    clip, trimmer = worker.clip(), EdgeTrimmer(worker.codec.sample_rate, settings.silence)
    parts = [
        trimmer.push(await clip.push(take.codes_KT.astype(np.int64))),
        trimmer.push(await clip.finish()),
        trimmer.finish(),
    ]
    return np.concatenate(parts)


class TakeMaker:
    """Makes takes with one engine and one codec."""

    def __init__(self, engine: Generates, worker: CodecWorker, settings: SynthesisSettings) -> None:
        self._engine, self._worker, self._settings = engine, worker, settings
        self._sample_rate_hz = worker.codec.sample_rate
        self._ids = (f"{uuid.uuid4().hex[:8]}-{number}" for number in itertools.count())

    async def make(self, job: ChunkJob) -> tuple[Take, Samples]:
        """The best of up to `attempts` takes, and its samples."""
        best: tuple[int, Take, Samples] | None = None
        attempts: list[Attempt] = []
        for number in range(self._settings.attempts):
            parts: list[Samples] = []
            async for event in self._attempt(job, number, _FRAMES_AN_UPDATE):
                if not isinstance(event, Take):
                    parts.append(event)
                    continue
                samples = np.concatenate([np.empty(0, np.float32), *parts])
                take = await self._listened_to(event, samples, job)
                attempts.append(take.attempt)
                badness = severity(take.attempt.faults)
                if best is None or badness < best[0]:
                    best = badness, dataclasses.replace(take, kept=number), samples
            if best is not None and best[0] == 0:
                break
        assert best is not None  # noqa: S101  (there is at least one attempt, and each ends in a take)
        return dataclasses.replace(best[1], attempts=tuple(attempts)), best[2]

    def live(self, job: ChunkJob) -> AsyncGenerator[Samples | Take]:
        """Samples of the first take as they come, and then the take itself."""
        return self._attempt(job, 0, _LIVE_FRAMES_AN_UPDATE)

    async def decode(self, take: Take) -> Samples:
        """The samples of a take that was made before, bit by bit those that it had then on the same CPU."""
        return await decode_take(take, self._worker, self._settings)

    def _trimmer(self) -> EdgeTrimmer:
        return EdgeTrimmer(self._sample_rate_hz, self._settings.silence)

    async def _attempt(self, job: ChunkJob, number: int, stream_every: int) -> AsyncGenerator[Samples | Take]:
        seed = derived_seed(job.seed, job.index, number)
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
        clip, trimmer = self._worker.clip(), self._trimmer()
        frames, kept, reason = [], [], FinishReason.INVALID
        async with contextlib.aclosing(self._engine.generate(request)) as updates:
            async for update in updates:
                frames.append(update.frames)
                reason = update.finish_reason or reason
                kept.append(trimmer.push(await clip.push(update.frames)))
                yield kept[-1]
        for rest in (trimmer.push(await clip.finish()), trimmer.finish()):
            kept.append(rest)
            yield rest
        # An hour of codes is kept in the memory of a minute of samples.
        codes_KT = np.concatenate(frames, axis=1).astype(np.int16)
        found = await asyncio.to_thread(self._faults, np.concatenate(kept), trimmer, reason, job.text)
        attempt = Attempt(seed, codes_KT.shape[1], reason.value, tuple(dict.fromkeys(found)))
        yield Take(job.index, codes_KT, (attempt,), kept=0)

    def _faults(self, samples_N: Samples, trimmer: EdgeTrimmer, reason: FinishReason, text: str) -> list[str]:
        limits, rate = self._settings.limits, self._sample_rate_hz
        heard = faults(
            measure(samples_N, rate, limits.silent_below_dbfs),
            wanted(text),
            head_silence_s=trimmer.head_samples / rate,
            tail_silence_s=trimmer.tail_samples / rate,
            limits=limits,
        )
        return ([_FAULT_OF[reason]] if reason in _FAULT_OF else []) + heard

    async def _listened_to(self, take: Take, samples_N: Samples, job: ChunkJob) -> Take:
        """The take, with what a recogniser has to say about it if it was good so far."""
        check = self._settings.check
        if check is None or not take.good:
            return take
        notes = await asyncio.to_thread(check, samples_N, self._sample_rate_hz, job.text, job.language)
        if not notes:
            return take
        attempt = dataclasses.replace(take.attempt, faults=("text",), notes=tuple(notes))
        return dataclasses.replace(take, attempts=(attempt,))
