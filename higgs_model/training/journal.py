"""What is told of a training: a line of JSON and points of TensorBoard, for each step that is logged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboardX import SummaryWriter

Value = float | int | Sequence[float]


class Journal:
    """The log of one training: `log.jsonl`, and `tensorboard/` for those who want curves.

    Args:
        done: steps that a training had done that is gone on with; what was told of later ones is taken out.
    """

    def __init__(self, output: Path, done: int) -> None:
        self._path = output / "log.jsonl"
        output.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step(line) <= done]
            self._path.write_text("".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=done + 1)

    def tell(self, step: int, values: Mapping[str, Value]) -> None:
        """Say what is known after a step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, Sequence):
                for at, one in enumerate(value):
                    self._board.add_scalar(f"{name}/{at}", one, step)
            else:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """No more will be told."""
        self._file.close()
        self._board.close()


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        # The half line that a killed process leaves.
        return 1 << 62
