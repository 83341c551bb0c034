"""What an engine has done, as plain numbers."""

from __future__ import annotations

import collections
import statistics
import time

from higgs_model.engine.request import FinishReason

FRAMES_A_SECOND = 25
_REMEMBERED = 1000


class EngineMetrics:
    """Counts since the start; `snapshot` makes rates of them.

    `slot_steps` counts slots that spoke, `possible_slot_steps` all that could have, over all steps in which one did.
    """

    def __init__(self, num_codebooks: int) -> None:
        self.num_codebooks = num_codebooks
        self.started_s = time.perf_counter()
        self.requests = self.frames = self.prefill_positions = 0
        self.steps = self.slot_steps = self.possible_slot_steps = 0
        self.finished: collections.Counter[FinishReason] = collections.Counter()
        self.first_frame_s: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)

    def count_step(self, speaking: int, slots: int) -> None:
        """A decode step in which so many slots spoke."""
        self.steps += 1
        self.slot_steps += speaking
        self.possible_slot_steps += slots

    def snapshot(self) -> dict[str, float]:
        """Totals, and rates since the start."""
        elapsed_s = time.perf_counter() - self.started_s
        return {
            "requests": self.requests,
            "decode_steps": self.steps,
            "decode_frames": self.frames,
            "prefill_positions": self.prefill_positions,
            "frames_per_s": self.frames / elapsed_s,
            "audio_s_per_s": self.frames / FRAMES_A_SECOND / elapsed_s,
            "occupancy": self.slot_steps / max(self.possible_slot_steps, 1),
            "first_frame_s_median": statistics.median(self.first_frame_s) if self.first_frame_s else 0.0,
            **{f"finished_{reason.value}": self.finished[reason] for reason in FinishReason},
        }
