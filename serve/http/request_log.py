"""Per-request context, logged as a JSON line and exported as Prometheus metrics when the request ends."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

_BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0)

access_log = logging.getLogger("higgs.access")


@dataclasses.dataclass
class RequestContext:
    """Mutable record of one request; each layer fills in its fields.

    Attributes:
        outcome: `ok`, `gone` (the client disconnected), `broken_off` (the response was aborted), or the error's code.
        queued_s: seconds from the request's arrival to the start of its synthesis.
        first_audio_s: seconds from the request's arrival to its first samples.
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
        """Return the seconds since the request arrived."""
        return time.monotonic() - self.arrived_s

    def to_json(self) -> str:
        """Return the JSON log line; fields that are unset or zero are omitted."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, 0, 0.0)}
        fields.pop("arrived_s", None)
        rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in fields.items()}
        return json.dumps({"time": round(time.time(), 3), **rounded, "seconds": round(self.elapsed_s(), 4)})


class RequestMetrics:
    """Prometheus metrics of an ingress replica, exported by Ray as `ray_higgs_…`."""

    def __init__(self) -> None:
        self._requests = Counter(
            "higgs_requests", description="requests by route and outcome", tag_keys=("route", "outcome")
        )
        self._audio = Counter("higgs_audio_seconds", description="seconds of audio sent", tag_keys=("format",))
        self._characters = Counter("higgs_characters", description="characters of text synthesized")
        self._first_audio = Histogram(
            "higgs_first_audio_seconds",
            description="seconds from a request's arrival to its first samples",
            boundaries=list(_BUCKETS_S),
        )
        self._queued = Histogram(
            "higgs_queued_seconds",
            description="seconds from a request's arrival to the start of its synthesis",
            boundaries=list(_BUCKETS_S),
        )
        self._request_duration = Histogram(
            "higgs_request_seconds",
            description="seconds from a request's arrival to its end",
            boundaries=list(_BUCKETS_S),
            tag_keys=("route",),
        )
        self._waiting = Gauge("higgs_requests_waiting", description="requests waiting for their first samples")
        self._running = Gauge("higgs_requests_speaking", description="requests being synthesized")

    def record(self, context: RequestContext) -> None:
        """Record a finished request."""
        self._requests.inc(1, {"route": context.route, "outcome": context.outcome})
        self._request_duration.observe(context.elapsed_s(), {"route": context.route})
        if context.audio_s:
            self._audio.inc(context.audio_s, {"format": context.format or "none"})
            self._characters.inc(context.characters)
        if context.first_audio_s is not None:
            self._first_audio.observe(context.first_audio_s)
        if context.queued_s is not None:
            self._queued.observe(context.queued_s)

    def set_in_flight(self, waiting: int, running: int) -> None:
        """Export the current number of waiting and running requests."""
        self._waiting.set(waiting)
        self._running.set(running)


class EngineMetrics:
    """The metrics of a replica's engine, exported by Ray as `ray_higgs_engine_…`."""

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

    def update(self, metrics: dict[str, float]) -> None:
        """Export those of the engine's metrics that have a gauge."""
        for name, gauge in self._gauges.items():
            if name in metrics:
                gauge.set(metrics[name])


def log_to_stderr() -> None:
    """Send the request log to stderr, one JSON line per request without a prefix."""
    if not access_log.handlers:
        handler: Any = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        access_log.addHandler(handler)
        access_log.setLevel(logging.INFO)
        access_log.propagate = False
