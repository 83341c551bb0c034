"""Per-slot decoding state on the device, as one table with a row per slot, so that a slot starts with a single copy.

Every field is a view of some columns. Integers are int64; `temperature` and `top_p` are float64 in the same eight
bytes. Captured decode steps read and write these addresses, so the seed and sampling parameters that a later request
writes here are the ones that the step uses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from higgs_model.delay import NOT_ENDING
from higgs_model.sampling import SamplingParams, SamplingTensors

NO_FRAME = -1
"""In `SlotState.forced`: the frame is sampled."""
NO_CODE = -1
"""In `SlotState.window`: no frame yet."""


class SlotState:
    """The state of S slots, a table (S, C) on a device.

    Attributes:
        active: (S,) 1 while a slot decodes, else 0.
        frame: (S, K) input of the next step, at position `length` (S,).
        forced: (S, K) the frame to use instead of a sampled one, or `NO_FRAME`.
        seed, step: (S,) state of the random numbers; `step` counts draws.
        started, remaining: (S,) of `DelayState`.
        window: (S, K, W) the most recent frames, for repetition-aware sampling.
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
        self.active, self.length, self.seed, self.step, self.num_started, self.num_remaining = (
            self._view(name).squeeze(1) for name in list(widths)[:6]
        )
        self.frame, self.forced = self._view("frame"), self._view("forced")
        self.window = self._view("window").unflatten(1, self._shape)

    def _view(self, name: str) -> Tensor:
        return self.rows[:, self._columns[name]]

    def sampling(self, count: int) -> SamplingTensors:
        """Return the sampling parameters of the first `count` slots, as views."""
        integers = {
            name: self._view(name)[:count] for name in ("do_sample", "top_k", "ras_win_len", "ras_win_max_num_repeat")
        }
        floats = {name: self._view(name)[:count].view(torch.float64).float() for name in ("temperature", "top_p")}
        return SamplingTensors(**integers | floats | {"do_sample": integers["do_sample"].bool()})

    def initial_row(
        self, *, bos_id: int, length: int, step: int, seed: int, sampling: SamplingParams, history_WK: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return the row (C,), on the host, of a slot that starts decoding after a frame of BOS.

        Args:
            length: positions before the BOS frame.
            step: of the first frame that is sampled.
            history_WK: frames of the prompt that repetition-aware sampling takes into account.
        """
        num_codebooks, width = self._shape
        row, columns = np.zeros(self.rows.shape[1], np.int64), self._columns
        floats = row.view(np.float64)
        window = np.full(self._shape, NO_CODE)
        if recent := min(len(history_WK), width, sampling.ras_win_len or 0):
            window[:, width - recent :] = history_WK[-recent:].T
        values: dict[str, Any] = {
            "active": 1, "length": length, "seed": seed, "step": step, "remaining": NOT_ENDING,
            "do_sample": sampling.do_sample, "top_k": min(sampling.top_k or self._vocabulary, self._vocabulary),
            "ras_win_len": sampling.ras_win_len or 0, "ras_win_max_num_repeat": sampling.ras_win_max_num_repeat,
            "frame": bos_id, "forced": NO_FRAME, "window": window.ravel(),
        }  # fmt: skip
        for name, value in values.items():
            row[columns[name]] = value
        floats[columns["temperature"]], floats[columns["top_p"]] = sampling.temperature, sampling.top_p
        return row
