"""The progress line of a job, and where a bar or lines are shown."""

import io

import pytest

from jobs.synthesize.ledger import Totals
from jobs.synthesize.progress import Progress, format_duration, progress_line, remaining_s


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_line_shows_rows_audio_rate_failures_and_time_left():
    totals = Totals(rows=40, chars=4000, ok=8, flagged=1, failed=1, chars_done=1000, audio_s=7200.0, working_s=100.0)
    line = progress_line(totals, elapsed_s=110.0)
    for part in ("10/40 rows", "2.00 h of audio", "72.0 audio s/s", "1 flagged", "1 failed", "about 5 min left"):
        assert part in line
    assert "already done" not in line


def test_rows_of_earlier_runs_do_not_shorten_the_estimate():
    totals = Totals(rows=100, chars=1000, skipped=90, chars_skipped=900, ok=5, chars_done=50, working_s=10.0)
    assert remaining_s(totals) == pytest.approx(10.0)
    assert "90 already done" in progress_line(totals, 20.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "1 h 0 min"), (12_000, "3 h 20 min")]
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def show(stream):
    progress = Progress(stream)
    for tenth in range(300):
        progress.update(Totals(rows=10, ok=tenth // 30), tenth / 10)
    progress.close()
    return stream.getvalue()


def test_log_gets_a_plain_line_every_ten_seconds():
    lines = show(io.StringIO()).splitlines()
    assert len(lines) == 3
    assert all("rows" in line and "\x1b" not in line for line in lines)


def test_terminal_gets_a_bar_that_is_redrawn_in_place(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    shown = show(Terminal())
    assert "\x1b[2K" in shown  # erases the line before it is drawn again
    assert "━" in shown
    assert "9/10 rows" in shown.split("\x1b[2K")[-1]
    assert 30 <= shown.count("rows") <= 62


def test_nothing_is_drawn_before_the_first_update():
    stream = Terminal()
    Progress(stream).close()
    assert stream.getvalue() == ""
