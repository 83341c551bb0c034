"""A stretch of one slot's positions that go through the network together."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Span:
    """Positions [start, stop) of the sequence in `slot`."""

    slot: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start
