"""All that a slot carries from step to step on the device: one row of one table, so that a slot begins with one copy.

Every field is a view of some columns. Numbers are int64; the two that are not whole are float64 in the same eight
bytes. Nothing here is a tensor of its own: a captured step reads and writes these very addresses, so what a later
request puts there, its seed and its sampling included, is what the step uses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from higgs_model.delay import NOT_ENDING
from higgs_model.sampling import RowSampling, SamplingParams

NO_FRAME = -1
"""In `SlotRows.forced`: the frame is drawn."""
NO_CODE = -1
"""In `SlotRows.window`: there was no frame yet."""


class SlotRows:
    """S slots, their rows (S, C) on a device.

    Attributes:
        active: (S,) 1 where a slot speaks, else 0.
        frame: (S, K) goes into the network next, at position `length` (S,).
        forced: (S, K) what the next frame must be, or `NO_FRAME`.
        seed, step: (S,) for the random numbers; `step` counts what was drawn.
        started, remaining: (S,) of `DelayState`.
        window: (S, K, W) the last frames, for the repetition rule.
    """

    def __init__(self, slots: int, num_codebooks: int, window: int, vocabulary: int, device: torch.device) -> None:
        self._vocabulary, self._shape = vocabulary, (num_codebooks, window)
        widths = {
            "active": 1, "length": 1, "seed": 1, "step": 1, "started": 1, "remaining": 1,
            "do_sample": 1, "temperature": 1, "top_k": 1, "top_p": 1, "ras_win_len": 1, "ras_win_max_num_repeat": 1,
            "frame": num_codebooks, "forced": num_codebooks, "window": num_codebooks * window,
        }  # fmt: skip
        ends = np.cumsum(list(widths.values())).tolist()
        self._columns = {name: slice(end - widths[name], end) for name, end in zip(widths, ends, strict=True)}
        self.rows = torch.zeros(slots, ends[-1], dtype=torch.int64, device=device)
        self.active, self.length, self.seed, self.step, self.started, self.remaining = (
            self._view(name).squeeze(1) for name in list(widths)[:6]
        )
        self.frame, self.forced = self._view("frame"), self._view("forced")
        self.window = self._view("window").unflatten(1, self._shape)

    def _view(self, name: str) -> Tensor:
        return self.rows[:, self._columns[name]]

    def sampling(self, count: int) -> RowSampling:
        """How the first `count` slots draw, read from their rows."""
        whole = {
            name: self._view(name)[:count] for name in ("do_sample", "top_k", "ras_win_len", "ras_win_max_num_repeat")
        }
        real = {name: self._view(name)[:count].view(torch.float64).float() for name in ("temperature", "top_p")}
        return RowSampling(**whole | real | {"do_sample": whole["do_sample"].bool()})

    def begun(
        self, *, bos_id: int, length: int, step: int, seed: int, sampling: SamplingParams, spoken_WK: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The row (C,), on the host, of a slot whose next frame comes after BOS.

        Args:
            length: positions before it.
            step: of the first frame that is drawn.
            spoken_WK: the last frames of the prompt that the repetition rule sees.
        """
        num_codebooks, width = self._shape
        row, columns = np.zeros(self.rows.shape[1], np.int64), self._columns
        real = row.view(np.float64)
        window = np.full(self._shape, NO_CODE)
        if recent := min(len(spoken_WK), width, sampling.ras_win_len or 0):
            window[:, width - recent :] = spoken_WK[-recent:].T
        numbers: dict[str, Any] = {
            "active": 1, "length": length, "seed": seed, "step": step, "remaining": NOT_ENDING,
            "do_sample": sampling.do_sample, "top_k": min(sampling.top_k or self._vocabulary, self._vocabulary),
            "ras_win_len": sampling.ras_win_len or 0, "ras_win_max_num_repeat": sampling.ras_win_max_num_repeat,
            "frame": bos_id, "forced": NO_FRAME, "window": window.ravel(),
        }  # fmt: skip
        for name, value in numbers.items():
            row[columns[name]] = value
        real[columns["temperature"]], real[columns["top_p"]] = sampling.temperature, sampling.top_p
        return row
