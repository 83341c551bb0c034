"""What a person sees of a job."""

import io

import pytest

from jobs.synthesize.ledger import Totals
from jobs.synthesize.progress import Progress, clock, line, remaining


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_says_how_far_how_fast_and_how_long():
    totals = Totals(rows=40, chars=4000, ok=8, flagged=1, failed=1, chars_done=1000, audio_s=7200.0, working_s=100.0)
    shown = line(totals, elapsed_s=110.0)
    for part in ("10/40 rows", "2.00 h of audio", "72.0 audio s/s", "1 flagged", "1 failed", "about 5 min left"):
        assert part in shown
    assert "done before" not in shown


def test_rows_that_were_done_before_do_not_make_it_look_fast():
    totals = Totals(rows=100, chars=1000, skipped=90, chars_skipped=900, ok=5, chars_done=50, working_s=10.0)
    assert remaining(totals) == pytest.approx(10.0)
    assert "90 done before" in line(totals, 20.0)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "1 h 0 min"), (12_000, "3 h 20 min")]
)
def test_clock(seconds, said):
    assert clock(seconds) == said


@pytest.mark.parametrize(("stream", "mark"), [(io.StringIO(), "\n"), (Terminal(), "\r")])
def test_a_bar_on_a_terminal_and_lines_in_a_log(stream, mark):
    progress = Progress(stream)
    for tenth in range(300):
        progress.show(Totals(rows=10, ok=tenth // 30), tenth / 10)
    progress.end()
    shown = stream.getvalue()
    assert mark in shown
    assert 3 <= shown.count("rows") <= 61
