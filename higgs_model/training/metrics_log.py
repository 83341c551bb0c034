"""Log of training metrics: one JSON line and TensorBoard scalars per logged step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboardX import SummaryWriter

MetricValue = float | int | Sequence[float]


class MetricsLog:
    """Log of one training run: `log.jsonl` and `tensorboard/` in the output folder.

    Args:
        output: output folder of the run.
        done: number of completed steps when resuming; entries of later steps are removed.
    """

    def __init__(self, output: Path, done: int) -> None:
        self._path = output / "log.jsonl"
        output.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            lines = [line for line in self._path.read_text().splitlines() if _step(line) <= done]
            self._path.write_text("".join(f"{line}\n" for line in lines))
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(output / "tensorboard"), purge_step=done + 1)

    def write(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Log metrics of a step; sequences become one TensorBoard scalar per element."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if isinstance(value, Sequence):
                for index, element in enumerate(value):
                    self._tensorboard.add_scalar(f"{name}/{index}", element, step)
            else:
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the log files."""
        self._file.close()
        self._tensorboard.close()


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        # An incomplete line of a killed process.
        return 1 << 62
