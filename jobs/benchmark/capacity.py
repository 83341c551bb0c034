"""How much how many GPUs make, what that costs, and what gives way first: arithmetic, and the page that shows it.

    python -m jobs.benchmark capacity                             the tables of infra/capacity.md, to read
    python -m jobs.benchmark capacity --gpu-audio-s-per-s 250     the same with another number
    python -m jobs.benchmark capacity --write infra/capacity.md   computes the page's tables anew

Numbers come from the page's first table, each measured, published or assumed; a test computes the other tables again.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "infra" / "capacity.md"
GPUS = (1, 10, 100, 1000)
HOURS = (100, 1000, 10_000, 100_000)
_HOUR_S, _MB = 3600, 1e6
_NUMBER = re.compile(
    r"^\| `(\w+)` \| ([\d.,]+) \| ([^|]*) \| (measured|published|assumed) \| ([^|]*) \|$", re.MULTILINE
)
_TABLE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


# ---------------------------------------------------------------------- arithmetic


def effective_rate(n: Mapping[str, float]) -> float:
    """Seconds of audio a second that one GPU adds to a job."""
    return n["gpu_audio_s_per_s"] * n["job_share"]


def cost_an_audio_hour(price_an_hour: float, rate: float) -> float:
    """Of one audio hour, from the price of a GPU and what it makes."""
    return price_an_hour / rate


def gpus_for(audio_hours: float, within_h: float, rate: float) -> int:
    """GPUs that make so many audio hours in so many hours."""
    return math.ceil(audio_hours / (within_h * rate))


def rows_per_s_wanted(gpus: int, rate: float, row_s: float) -> float:
    """Rows a second that so many GPUs end."""
    return gpus * rate / row_s


def rows_per_s_through(wanted: float, limit: float) -> float:
    """Rows a second that come through one job, of those that its GPUs could end."""
    return min(wanted, limit)


def s3_writes(row_s: float, n: Mapping[str, float]) -> int:
    """Calls that write a row's audio: a large file goes in parts, with a call before and one behind them."""
    parts = math.ceil(row_s * n["wav_mb_an_hour"] / _HOUR_S / n["s3_part_mb"])
    return parts if parts == 1 else parts + 2


def loads(gpus: int, row_s: float, n: Mapping[str, float]) -> dict[str, float]:
    """What so many GPUs ask of each part of a job, as a share of what it can do; above 1 it gives way."""
    rows = rows_per_s_wanted(gpus, effective_rate(n), row_s)
    results_per_s = 1 / n["result_part_every_s"]
    return {
        "driver and ledger": rows / n["rows_per_s"],
        "S3 writes, one partition": (rows * s3_writes(row_s, n) + results_per_s) / n["s3_puts_per_s"],
        "network of a worker's machine": effective_rate(n) * n["wav_mb_an_hour"] / _HOUR_S / n["network_mb_per_s"],
        "driver's memory, a day of rows": rows * 24 * _HOUR_S * n["driver_bytes_a_row"] / (n["driver_gb"] * 1e9),
    }


# ---------------------------------------------------------------------- tables


def made_table(n: Mapping[str, float]) -> Iterator[Sequence[str]]:
    """GPUs, and what they make and cost."""
    rate = effective_rate(n)
    yield "GPUs", "audio hours an hour", "a day", "an audio hour costs", "on spot machines", "WAV a day"
    for gpus in GPUS:
        yield (
            f"{gpus:,}",
            f"{gpus * rate:,.0f}",
            f"{gpus * rate * 24:,.0f}",
            f"{cost_an_audio_hour(n['gpu_price'], rate):.3f} $",
            f"{cost_an_audio_hour(n['gpu_price_spot'], rate) * (1 + n['lost_to_preemption']):.3f} $",
            f"{gpus * rate * 24 * n['wav_mb_an_hour'] / _MB:,.2f} TB",
        )


def needed_table(n: Mapping[str, float]) -> Iterator[Sequence[str]]:
    """Audio hours, and the GPUs that make them in time."""
    yield "audio hours", "GPUs, in 1 hour", "in 8", "in 24", "GPU hours", "on spot machines"
    rate = effective_rate(n)
    for hours in HOURS:
        gpu_hours = hours / rate
        yield (
            f"{hours:,}",
            *(f"{gpus_for(hours, within, rate):,}" for within in (1, 8, 24)),
            f"{gpu_hours:,.0f}",
            f"{gpu_hours * n['gpu_price_spot'] * (1 + n['lost_to_preemption']):,.0f} $",
        )


def bottleneck_table(n: Mapping[str, float]) -> Iterator[Sequence[str]]:
    """GPUs and rows, and how full each part is."""
    names = list(loads(1, 1, n))
    yield "GPUs", "row", "rows a second", *names, "jobs side by side"
    for row_s in (n["short_row_s"], n["long_row_s"]):
        for gpus in GPUS[1:]:
            found = loads(gpus, row_s, n)
            jobs = math.ceil(max(found["driver and ledger"], found["driver's memory, a day of rows"]))
            wanted = rows_per_s_wanted(gpus, effective_rate(n), row_s)
            yield (
                *(f"{gpus:,}", f"{row_s:.0f} s", f"{wanted:,.1f}"),
                *(f"**{one:.0%}**" if one > 1 else f"{one:.1%}" for one in found.values()),
                f"{jobs}",
            )


TABLES = {"made": made_table, "needed": needed_table, "bottlenecks": bottleneck_table}


def numbers(text: str) -> dict[str, float]:
    """The numbers of a page's first table by name."""
    return {name: float(value.replace(",", "")) for name, value, *_ in _NUMBER.findall(text)}


def markdown(rows: Iterator[Sequence[str]]) -> str:
    """Rows as a table; the first is its head."""
    head, *body = (f"| {' | '.join(row)} |\n" for row in rows)
    return head + "|" + "---|" * (head.count("|") - 1) + "\n" + "".join(body)


def computed(text: str, n: Mapping[str, float]) -> str:
    """A page with its tables computed anew."""
    return _TABLE.sub(lambda found: found[1] + markdown(TABLES[found[2]](n)) + found[3], text)


# ---------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line: each number of the page may be another."""
    for name, value in numbers(PAGE.read_text()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help=f"{value:g} in the page")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="compute the tables of this page anew")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the tables; gives the numbers that they come from."""
    text = PAGE.read_text()
    n = {name: getattr(arguments, name) for name in numbers(text)}
    if arguments.write:
        arguments.write.write_text(computed(arguments.write.read_text(), n))
    for table in TABLES.values():
        print(markdown(table(n)))
    return n
