"""What is remembered of a request: written by whoever knows it, told once at the end as a JSON line and as metrics."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0)

access = logging.getLogger("higgs.access")


@dataclasses.dataclass
class RequestFacts:
    """One request.

    Attributes:
        outcome: `ok`, `gone` (the client went away), or the code of the error.
        first_audio_s: until the first samples were here, from the request's arrival.
        queued_s: until a synthesizer began with it.
    """

    request_id: str
    method: str
    path: str
    arrived_s: float = dataclasses.field(default_factory=time.monotonic)
    route: str = "other"
    status: int = 0
    outcome: str = "ok"
    characters: int = 0
    format: str | None = None
    voice: str | None = None
    queued_s: float | None = None
    first_audio_s: float | None = None
    audio_s: float = 0.0
    chunks: int = 0
    bytes_out: int = 0
    error: str | None = None

    def elapsed_s(self) -> float:
        """Since it arrived."""
        return time.monotonic() - self.arrived_s

    def line(self) -> str:
        """As JSON, without what is not known."""
        kept = {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, 0, 0.0)}
        kept.pop("arrived_s", None)
        rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in kept.items()}
        return json.dumps({"time": round(time.time(), 3), **rounded, "seconds": round(self.elapsed_s(), 4)})


class RequestMetrics:
    """Prometheus metrics of an HTTP worker, exported by Ray as `ray_higgs_…`."""

    def __init__(self) -> None:
        self._requests = Counter(
            "higgs_requests", description="requests by route and outcome", tag_keys=("route", "outcome")
        )
        self._audio = Counter("higgs_audio_seconds", description="seconds of audio sent", tag_keys=("format",))
        self._characters = Counter("higgs_characters", description="characters of text that were spoken")
        self._first_audio = Histogram(
            "higgs_first_audio_seconds", description="from a request to its first samples", boundaries=list(_SECONDS)
        )
        self._queued = Histogram(
            "higgs_queued_seconds", description="until a synthesizer begins", boundaries=list(_SECONDS)
        )
        self._seconds = Histogram(
            "higgs_request_seconds",
            description="from a request to its end",
            boundaries=list(_SECONDS),
            tag_keys=("route",),
        )
        self._waiting = Gauge("higgs_requests_waiting", description="requests whose first samples are not here yet")
        self._speaking = Gauge("higgs_requests_speaking", description="requests that are being spoken")

    def ended(self, facts: RequestFacts) -> None:
        """Count a request."""
        self._requests.inc(1, {"route": facts.route, "outcome": facts.outcome})
        self._seconds.observe(facts.elapsed_s(), {"route": facts.route})
        if facts.audio_s:
            self._audio.inc(facts.audio_s, {"format": facts.format or "none"})
            self._characters.inc(facts.characters)
        if facts.first_audio_s is not None:
            self._first_audio.observe(facts.first_audio_s)
        if facts.queued_s is not None:
            self._queued.observe(facts.queued_s)

    def under_way(self, waiting: int, speaking: int) -> None:
        """How many requests there are now."""
        self._waiting.set(waiting)
        self._speaking.set(speaking)


class EngineMetrics:
    """What a synthesizer's engine says of itself, as `ray_higgs_engine_…`."""

    _NAMES = (
        "running",
        "queued",
        "occupancy",
        "kv_blocks_used",
        "kv_blocks",
        "frames_per_s",
        "decode_frames",
        "audio_s_per_s",
        "preemptions",
    )

    def __init__(self) -> None:
        self._gauges = {
            name: Gauge(f"higgs_engine_{name}", description=f"{name} of a synthesizer's engine") for name in self._NAMES
        }

    def show(self, numbers: dict[str, float]) -> None:
        """Export those that there are."""
        for name, gauge in self._gauges.items():
            if name in numbers:
                gauge.set(numbers[name])


def log_to_stderr() -> None:
    """A line a request, and nothing around it."""
    if not access.handlers:
        handler: Any = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        access.addHandler(handler)
        access.setLevel(logging.INFO)
        access.propagate = False
