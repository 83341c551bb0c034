"""A fake `Synthesizer` that needs no weights and no computing time, for tests and benchmarks of its callers.

Every chunk is a tone whose pitch and duration depend on its text alone.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

import numpy as np

from higgs_model.script.plan import Plan
from higgs_model.synthesizer.records import Piece, SynthesizedChunk, Take, TakeMetadata

if TYPE_CHECKING:
    from higgs_model.synthesizer.synthesizer import SegmentStore

_CODEBOOKS = 8


class FakeSynthesizer:
    """Generates tones for scripts.

    Args:
        chars_per_s: speaking rate.
        pace: wall-clock seconds per second of audio, regardless of concurrency.
    """

    sample_rate = 24_000

    def __init__(self, *, chars_per_s: float = 15.0, pace: float = 0.0) -> None:
        self._chars_per_s, self._pace = chars_per_s, pace
        self._generated_s = 0.0

    async def stream(
        self, plan: Plan, *, live: bool = False, priority: int = 0, segment_store: SegmentStore | None = None
    ) -> AsyncGenerator[Piece]:
        """Yield one piece per chunk; with `live`, one per second of audio."""
        position = 0
        for chunk in plan.chunks:
            digest = hashlib.sha256(f"{plan.script.seed}/{chunk.prompt_text}".encode()).digest()
            frames = max(round(25 * len(chunk.text) / self._chars_per_s), 1)
            samples = frames * self.sample_rate // 25
            tone = 0.2 * np.sin(np.arange(samples) * (0.03 + digest[0] / 2000))
            attempt = TakeMetadata(int.from_bytes(digest[:7], "big"), frames, "stop")
            take = Take(chunk.index, np.full((_CODEBOOKS, frames), digest[1], np.int16), (attempt,), 0)
            speakers = tuple(plan.script.speaker_name(tag) for tag in chunk.speakers)
            synthesized = SynthesizedChunk(
                chunk.index, chunk.text, speakers, position, position + samples, self.sample_rate, take
            )
            position += samples
            parts = np.split(
                tone.astype(np.float32), range(self.sample_rate, samples, self.sample_rate) if live else []
            )
            for number, part in enumerate(parts):
                if self._pace:
                    await asyncio.sleep(self._pace * len(part) / self.sample_rate)
                self._generated_s += len(part) / self.sample_rate
                yield Piece(part, synthesized if number == len(parts) - 1 else None)

    def count_tokens(self, text: str) -> int:
        """Return the number of words."""
        return len(text.split())

    def metrics(self) -> dict[str, float]:
        """Return the seconds of audio generated so far."""
        return {"audio_s": self._generated_s}

    def close(self) -> None:
        """Do nothing, because there are no resources to release."""
