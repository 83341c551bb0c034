"""A contiguous range of one slot's prompt that goes through the network in one prefill pass."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PrefillSpan:
    """Positions [start, stop) of the sequence in `slot`."""

    slot: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start
