"""Throughput and cost of a number of GPUs, and the first bottleneck: formulas, and the tables of infra/capacity.md.

    python -m jobs.benchmark capacity                             prints the tables
    python -m jobs.benchmark capacity --gpu-audio-s-per-s 250     prints them with another value
    python -m jobs.benchmark capacity --write infra/capacity.md   updates the tables in the page

The values come from the page's first table, each measured, published or assumed; a test recomputes the other tables.
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
    """Return the seconds of audio per second that one GPU adds to a job."""
    return n["gpu_audio_s_per_s"] * n["job_share"]


def cost_per_audio_hour(price_per_gpu_hour: float, rate: float) -> float:
    """Return the cost of one hour of audio at `rate` seconds of audio per second."""
    return price_per_gpu_hour / rate


def gpus_for(audio_hours: float, within_h: float, rate: float) -> int:
    """Return the number of GPUs that generate `audio_hours` within `within_h` hours."""
    return math.ceil(audio_hours / (within_h * rate))


def rows_per_s_demand(gpus: int, rate: float, row_s: float) -> float:
    """Return the rows per second that the GPUs can finish, for rows of `row_s` seconds of audio."""
    return gpus * rate / row_s


def rows_per_s_through(demand: float, limit: float) -> float:
    """Return the rows per second that one job achieves, given the GPUs' demand and the job's limit."""
    return min(demand, limit)


def s3_writes(row_s: float, n: Mapping[str, float]) -> int:
    """Return the number of S3 calls that write a row's audio.

    A large file is a multipart upload: one call per part, one before them and one after.
    """
    parts = math.ceil(row_s * n["wav_mb_an_hour"] / _HOUR_S / n["s3_part_mb"])
    return parts if parts == 1 else parts + 2


def loads(gpus: int, row_s: float, n: Mapping[str, float]) -> dict[str, float]:
    """Return the load of each part of a job as a share of its capacity; above 1 it is a bottleneck."""
    rows_per_s = rows_per_s_demand(gpus, effective_rate(n), row_s)
    rows_per_day = rows_per_s * 24 * _HOUR_S
    results_per_s = 1 / n["result_part_every_s"]
    return {
        "driver and ledger": rows_per_s / n["rows_per_s"],
        "S3 writes, one partition": (rows_per_s * s3_writes(row_s, n) + results_per_s) / n["s3_puts_per_s"],
        "worker's network": effective_rate(n) * n["wav_mb_an_hour"] / _HOUR_S / n["network_mb_per_s"],
        "driver's memory, one day of rows": rows_per_day * n["driver_bytes_a_row"] / (n["driver_gb"] * 1e9),
    }


# ---------------------------------------------------------------------- tables


def production_table(n: Mapping[str, float]) -> Iterator[Sequence[str]]:
    """Yield the rows of the table of throughput and cost by number of GPUs, header first."""
    rate = effective_rate(n)
    yield (
        "GPUs",
        "audio hours per hour",
        "audio hours per day",
        "cost per audio hour",
        "spot cost per audio hour",
        "WAV per day",
    )
    for gpus in GPUS:
        yield (
            f"{gpus:,}",
            f"{gpus * rate:,.0f}",
            f"{gpus * rate * 24:,.0f}",
            f"{cost_per_audio_hour(n['gpu_price'], rate):.3f} $",
            f"{cost_per_audio_hour(n['gpu_price_spot'], rate) * (1 + n['lost_to_preemption']):.3f} $",
            f"{gpus * rate * 24 * n['wav_mb_an_hour'] / _MB:,.2f} TB",
        )


def requirements_table(n: Mapping[str, float]) -> Iterator[Sequence[str]]:
    """Yield the rows of the table of GPUs required by hours of audio and deadline, header first."""
    yield "audio hours", "GPUs for 1 hour", "for 8 hours", "for 24 hours", "GPU hours", "spot cost"
    rate = effective_rate(n)
    for hours in HOURS:
        gpu_hours = hours / rate
        yield (
            f"{hours:,}",
            *(f"{gpus_for(hours, within_h, rate):,}" for within_h in (1, 8, 24)),
            f"{gpu_hours:,.0f}",
            f"{gpu_hours * n['gpu_price_spot'] * (1 + n['lost_to_preemption']):,.0f} $",
        )


def bottleneck_table(n: Mapping[str, float]) -> Iterator[Sequence[str]]:
    """Yield the rows of the table of loads by row length and number of GPUs, header first."""
    names = list(loads(1, 1, n))
    yield "GPUs", "row length", "rows/s", *names, "parallel jobs"
    for row_s in (n["short_row_s"], n["long_row_s"]):
        for gpus in GPUS[1:]:
            shares = loads(gpus, row_s, n)
            jobs = math.ceil(max(shares["driver and ledger"], shares["driver's memory, one day of rows"]))
            demand = rows_per_s_demand(gpus, effective_rate(n), row_s)
            yield (
                *(f"{gpus:,}", f"{row_s:.0f} s", f"{demand:,.1f}"),
                *(f"**{share:.0%}**" if share > 1 else f"{share:.1%}" for share in shares.values()),
                f"{jobs}",
            )


TABLES = {"made": production_table, "needed": requirements_table, "bottlenecks": bottleneck_table}


def parse_numbers(text: str) -> dict[str, float]:
    """Parse the values in a page's first table, by name."""
    return {name: float(value.replace(",", "")) for name, value, *_ in _NUMBER.findall(text)}


def format_markdown(rows: Iterator[Sequence[str]]) -> str:
    """Format rows as a Markdown table; the first row is its header."""
    header, *body = (f"| {' | '.join(row)} |\n" for row in rows)
    return header + "|" + "---|" * (header.count("|") - 1) + "\n" + "".join(body)


def fill_tables(text: str, n: Mapping[str, float]) -> str:
    """Return a page with its tables recomputed."""
    return _TABLE.sub(lambda match: match[1] + format_markdown(TABLES[match[2]](n)) + match[3], text)


# ---------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each value of the page, and this benchmark's own."""
    for name, value in parse_numbers(PAGE.read_text()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help=f"page: {value:g}")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="update the tables of this page")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the tables and return the values they are computed from."""
    text = PAGE.read_text()
    n = {name: getattr(arguments, name) for name in parse_numbers(text)}
    if arguments.write:
        arguments.write.write_text(fill_tables(arguments.write.read_text(), n))
    for table in TABLES.values():
        print(format_markdown(table(n)))
    return n
