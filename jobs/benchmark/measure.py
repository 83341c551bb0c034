"""How all benchmarks measure: contenders in turn, a warm-up, medians with their spread, and the machine they ran on."""

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
    """Seconds of one contender over the counted rounds."""

    median_s: float
    fastest_s: float
    slowest_s: float

    def rate(self, amount: float) -> dict[str, float]:
        """`amount` a second: median, lowest, highest."""
        return {
            "median": round(amount / self.median_s, 2),
            "lowest": round(amount / self.slowest_s, 2),
            "highest": round(amount / self.fastest_s, 2),
        }


def in_turn(contenders: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Time contenders A B A B …, after one round that does not count: a machine that drifts drifts for all."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for counted in [False] + [True] * rounds:
        for name, run in contenders.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(taken), min(taken), max(taken)) for name, taken in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bandwidth(device: torch.device, megabytes: int = 256, rounds: int = 5) -> float:
    """Bytes a second that the device reads from memory: the fastest of several sums over a large buffer."""
    buffer = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    timing = in_turn({"read": buffer.sum}, rounds, device)["read"]
    return buffer.numel() * 4 / timing.fastest_s


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
