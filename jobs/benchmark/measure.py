"""Timing for all benchmarks: interleaved rounds after a warm-up, medians with their range, and the machine."""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one contender over the counted rounds."""

    median_s: float
    fastest_s: float
    slowest_s: float

    def rate(self, amount: float) -> dict[str, float]:
        """Return `amount` per second: median, lowest and highest."""
        return {
            "median": round(amount / self.median_s, 2),
            "lowest": round(amount / self.slowest_s, 2),
            "highest": round(amount / self.fastest_s, 2),
        }


def time_interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, Timing]:
    """Time contenders alternately (A B A B …) after one warm-up round, so that drift of the machine affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for counted in [False] + [True] * rounds:
        for name, run in contenders.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(times), min(times), max(times)) for name, times in seconds.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_read_bandwidth(device: torch.device, megabytes: int = 256, rounds: int = 5) -> float:
    """Return the device's memory read bandwidth in bytes per second: the fastest of several sums of a large buffer."""
    buffer = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    timing = time_interleaved({"read": buffer.sum}, rounds, device)["read"]
    return buffer.numel() * 4 / timing.fastest_s


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the hardware and library versions of this run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
