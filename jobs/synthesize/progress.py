"""What a person sees of a job: how far it is, how fast, how long still.

A line that is rewritten on a terminal, and a new line now and then in a log. Numbers in, text out; the clock is passed
in.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TextIO

from jobs.synthesize.ledger import Totals

_LOG_EVERY_S, _BAR_EVERY_S = 10.0, 0.5
_BAR_WIDTH = 24


def line(totals: Totals, elapsed_s: float) -> str:
    """One line about a job under way."""
    made_s, working_s = totals.audio_s, totals.working_s
    parts = [
        f"{totals.ended}/{totals.rows} rows",
        f"{made_s / 3600:.2f} h of audio",
        f"{made_s / working_s if working_s else 0:.1f} audio s/s",
    ]
    if totals.skipped:
        parts.append(f"{totals.skipped} done before")
    if totals.flagged:
        parts.append(f"{totals.flagged} flagged")
    parts.append(f"{totals.failed} failed")
    remaining_s = remaining(totals)
    parts.append(f"about {clock(remaining_s)} left" if remaining_s is not None else f"{clock(elapsed_s)} so far")
    return " · ".join(parts)


def remaining(totals: Totals) -> float | None:
    """Seconds that the rest will take at the rate so far; None while nothing can be said."""
    if totals.chars_done == 0 or totals.ended == totals.rows:
        return None
    left = totals.chars - totals.chars_done - totals.chars_skipped
    return totals.working_s * max(left, 0) / totals.chars_done


def clock(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 7 min, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@dataclasses.dataclass
class Progress:
    """Shows a job's totals as they change."""

    stream: TextIO = dataclasses.field(default_factory=lambda: sys.stderr)
    shown_s: float = float("-inf")

    def show(self, totals: Totals, elapsed_s: float) -> None:
        """Show them, if it is time to."""
        terminal = self.stream.isatty()
        if elapsed_s - self.shown_s < (_BAR_EVERY_S if terminal else _LOG_EVERY_S):
            return
        self.shown_s = elapsed_s
        if terminal:
            filled = _BAR_WIDTH * totals.ended // max(totals.rows, 1)
            self.stream.write(f"\r\033[K[{'█' * filled}{'·' * (_BAR_WIDTH - filled)}] {line(totals, elapsed_s)}")
        else:
            self.stream.write(line(totals, elapsed_s) + "\n")
        self.stream.flush()

    def end(self) -> None:
        """Leave the line as it is."""
        if self.stream.isatty():
            self.stream.write("\n")
