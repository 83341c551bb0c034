"""Something that stands for a `Synthesizer` where no model is wanted: it needs no weights and takes no time.

Every chunk is a tone whose pitch and length follow from its text alone. Jobs and endpoints are measured and tested with
it, and so is everything around the model.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

import numpy as np

from higgs_model.script.plan import Plan
from higgs_model.synthesizer.records import Attempt, Piece, SpokenChunk, Take

if TYPE_CHECKING:
    from higgs_model.synthesizer.synthesizer import SegmentStore

_CODEBOOKS = 8


class FakeSynthesizer:
    """Tones for scripts.

    Args:
        chars_per_s: how fast it speaks.
        pace: seconds that a second of audio takes to make, however many are made at once.
    """

    sample_rate = 24_000

    def __init__(self, *, chars_per_s: float = 15.0, pace: float = 0.0) -> None:
        self._chars_per_s, self._pace = chars_per_s, pace
        self._made_s = 0.0

    async def speak(
        self, plan: Plan, *, live: bool = False, priority: int = 0, kept: SegmentStore | None = None
    ) -> AsyncGenerator[Piece]:
        """A piece a chunk; live, a piece for each second of it."""
        position = 0
        for chunk in plan.chunks:
            digest = hashlib.sha256(f"{plan.script.seed}/{chunk.prompt_text}".encode()).digest()
            frames = max(round(25 * len(chunk.text) / self._chars_per_s), 1)
            samples = frames * self.sample_rate // 25
            tone = 0.2 * np.sin(np.arange(samples) * (0.03 + digest[0] / 2000))
            attempt = Attempt(int.from_bytes(digest[:7], "big"), frames, "stop")
            take = Take(chunk.index, np.full((_CODEBOOKS, frames), digest[1], np.int16), (attempt,), 0)
            speakers = tuple(plan.script.speaker_name(tag) for tag in chunk.speakers)
            spoken = SpokenChunk(
                chunk.index, chunk.text, speakers, position, position + samples, self.sample_rate, take
            )
            position += samples
            parts = np.split(
                tone.astype(np.float32), range(self.sample_rate, samples, self.sample_rate) if live else []
            )
            for number, part in enumerate(parts):
                if self._pace:
                    await asyncio.sleep(self._pace * len(part) / self.sample_rate)
                self._made_s += len(part) / self.sample_rate
                yield Piece(part, spoken if number == len(parts) - 1 else None)

    def count_tokens(self, text: str) -> int:
        """Words."""
        return len(text.split())

    def numbers(self) -> dict[str, float]:
        """Seconds of audio so far."""
        return {"audio_s": self._made_s}

    def close(self) -> None:
        """There is nothing to let go of."""
