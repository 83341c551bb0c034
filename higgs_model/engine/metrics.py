"""Counters of an engine, and the rates derived from them."""

from __future__ import annotations

import collections
import statistics
import time

from higgs_model.engine.request import FinishReason

FRAMES_PER_SECOND = 25
_MAX_LATENCIES = 1000
_RATE_WINDOW_S = 30.0
_SAMPLE_INTERVAL_S = 1.0


class EngineMetrics:
    """Totals since the start; `snapshot` derives rates.

    `frames` excludes replayed ones. `slot_steps` counts the decoding slots and `possible_slot_steps` all slots, summed
    over the steps in which at least one decoded.
    """

    def __init__(self) -> None:
        self.requests = self.frames = self.text_tokens = 0
        self.prefill_positions = self.prefill_passes = 0
        self.steps = self.slot_steps = self.possible_slot_steps = 0
        self.finished: collections.Counter[FinishReason] = collections.Counter()
        self.first_frame_s: collections.deque[float] = collections.deque(maxlen=_MAX_LATENCIES)
        self._samples = collections.deque([(time.perf_counter(), 0)])

    def count_step(self, decoding: int, slots: int) -> None:
        """Count a decode step in which `decoding` of `slots` slots took part."""
        self.steps += 1
        self.slot_steps += decoding
        self.possible_slot_steps += slots
        now_s = time.perf_counter()
        if now_s - self._samples[-1][0] >= _SAMPLE_INTERVAL_S:
            self._samples.append((now_s, self.frames))
            while now_s - self._samples[0][0] > _RATE_WINDOW_S:
                self._samples.popleft()

    def snapshot(self) -> dict[str, float]:
        """Return totals, the rates of the last half minute, and the time to first frame of recent requests."""
        start_s, start_frames = self._samples[0]
        frames_per_s = (self.frames - start_frames) / max(time.perf_counter() - start_s, 1e-9)
        latencies_s = tuple(self.first_frame_s)
        return {
            "requests": self.requests,
            "decode_steps": self.steps,
            "decode_frames": self.frames,
            "text_tokens": self.text_tokens,
            "prefill_positions": self.prefill_positions,
            "prefill_passes": self.prefill_passes,
            "frames_per_s": frames_per_s,
            "audio_s_per_s": frames_per_s / FRAMES_PER_SECOND,
            "occupancy": self.slot_steps / max(self.possible_slot_steps, 1),
            "first_frame_s_median": statistics.median(latencies_s) if latencies_s else 0.0,
            "first_frame_s_p95": sorted(latencies_s)[int(0.95 * len(latencies_s))] if latencies_s else 0.0,
            **{f"finished_{reason.value}": self.finished[reason] for reason in FinishReason},
        }
