"""Progress of a job: a live bar on a terminal, a plain line every ten seconds in a log.

It receives the ledger's totals and the elapsed time; it has no clock of its own.
"""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from jobs.synthesize.ledger import Totals

_LOG_INTERVAL_S, _LIVE_INTERVAL_S = 10.0, 0.5
_BAR_WIDTH = 30


def progress_line(totals: Totals, elapsed_s: float) -> str:
    """Summarize a running job in one line: rows, audio, rate, failures, and the time that is left."""
    working_s = totals.working_s
    parts = [
        f"{totals.ended}/{totals.rows} rows",
        f"{totals.audio_s / 3600:.2f} h of audio",
        f"{totals.audio_s / working_s if working_s else 0:.1f} audio s/s",
    ]
    if totals.skipped:
        parts.append(f"{totals.skipped} already done")
    if totals.flagged:
        parts.append(f"{totals.flagged} flagged")
    parts.append(f"{totals.failed} failed")
    left_s = remaining_s(totals)
    parts.append(f"{format_duration(elapsed_s)} elapsed" if left_s is None else f"about {format_duration(left_s)} left")
    return " · ".join(parts)


def remaining_s(totals: Totals) -> float | None:
    """Estimate the seconds left from the characters synthesized so far; None before the first row has finished.

    Rows that an earlier run finished count neither as progress nor as work.
    """
    if totals.chars_done == 0 or totals.ended == totals.rows:
        return None
    chars_left = totals.chars - totals.chars_done - totals.chars_skipped
    return totals.working_s * max(chars_left, 0) / totals.chars_done


def format_duration(seconds: float) -> str:
    """Format a duration for people: 42 s, 7 min, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Progress:
    """Shows the totals of a job as they change.

    Args:
        stream: a terminal gets a bar that is redrawn in place, anything else gets lines.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        console = Console(file=self._stream)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._last_shown_s = float("-inf")

    def update(self, totals: Totals, elapsed_s: float) -> None:
        """Show the totals, unless the last update was too recent."""
        interval_s = _LOG_INTERVAL_S if self._live is None else _LIVE_INTERVAL_S
        if elapsed_s - self._last_shown_s < interval_s:
            return
        self._last_shown_s = elapsed_s
        line = progress_line(totals, elapsed_s)
        if self._live is None:
            self._stream.write(line + "\n")
            self._stream.flush()
            return
        bar = ProgressBar(total=max(totals.rows, 1), completed=totals.ended, width=_BAR_WIDTH)
        row = Table.grid(padding=(0, 1))
        row.add_row(bar, line)
        self._live.start()
        self._live.update(row, refresh=True)

    def close(self) -> None:
        """Leave the last state on the terminal."""
        if self._live is not None:
            self._live.stop()
