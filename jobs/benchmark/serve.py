"""The endpoint over real HTTP on the loopback, next to the same synthesizer called in this process.

`serve run serve.app:app` runs as a process of its own; both speak the same texts with the same seeds, in turn, by 1, 4,
16 and 64 clients at the same time. With `--soak`: many clients for a while, half of whom go away in the middle.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import torch

from higgs_model import Script
from higgs_model.engine.settings import EngineSettings
from higgs_model.synthesizer import SynthesisSettings, Synthesizer
from jobs.benchmark import checkpoint, measure
from jobs.benchmark.endpoint import Place, endpoint, open_session
from jobs.benchmark.soak import SENTENCE, soak


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of this benchmark."""
    checkpoint.add_arguments(parser)
    parser.add_argument("--slots", type=int, default=16, help="requests that are spoken at the same time")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=64, help="requests in a round; fewer for few clients")
    parser.add_argument("--frames", type=int, default=250, help="of the longest answer; the shortest has a fifth")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds")
    parser.add_argument(
        "--proxy", choices=["haproxy", "python"], default="haproxy", help="which of Serve's proxies takes the requests"
    )
    parser.add_argument(
        "--soak", type=float, default=0, metavar="SECONDS", help="instead: clients of whom half go away"
    )
    parser.add_argument("--soak-clients", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    if arguments.quick:
        arguments.clients, arguments.requests, arguments.frames, arguments.rounds = [1, 4], 8, 50, 1
        arguments.hidden_size, arguments.layers = 64, 2
    with tempfile.TemporaryDirectory(prefix="higgs-") as folder:
        arguments.model = checkpoint.named_or_random(arguments, Path(folder))
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    print(f"{arguments.model}, {arguments.slots} slots, {arguments.proxy}, {measure.machine(torch.device('cpu'))}")
    queued = 32 if arguments.soak else max(arguments.clients)
    with endpoint(arguments.model, arguments.slots, queued, arguments.proxy) as place:
        if arguments.soak:
            return asyncio.run(soak(place, arguments.soak, arguments.soak_clients))
        return compare(place, arguments)


@dataclasses.dataclass(frozen=True)
class Spoken:
    """One request, as somebody who waits for it sees it."""

    first_audio_s: float
    total_s: float
    audio_s: float


Speak = Callable[[dict[str, Any]], Awaitable[Spoken]]


def bodies(count: int, longest: int) -> list[dict[str, Any]]:
    """Texts of uneven lengths, each with a seed of its own."""
    drawn = random.Random(0)
    return [
        {
            "input": SENTENCE * drawn.randint(1, 4),
            "seed": number,
            "max_frames": round(longest * 5 ** -drawn.random()),
            "response_format": "pcm",
        }
        for number in range(count)
    ]


def compare(place: Place, arguments: argparse.Namespace) -> dict[str, Any]:
    """The endpoint and the synthesizer alone, in turn, for each number of clients."""
    alone = Synthesizer.from_pretrained(
        arguments.model, engine=EngineSettings(max_slots=arguments.slots), settings=SynthesisSettings()
    )
    table: dict[str, Any] = {
        "model": arguments.model,
        "slots": arguments.slots,
        "proxy": arguments.proxy,
        "by_clients": {},
    }
    try:
        table["overhead"] = asyncio.run(_overhead(place, alone, 5 if arguments.quick else 100))
        print(f"overhead of a short request: {table['overhead']}")
        for clients in arguments.clients:
            asked = bodies(min(arguments.requests, 16 * clients), arguments.frames)
            table["by_clients"][clients] = _compared(place, alone, asked, clients, arguments.rounds)
            _report(clients, table["by_clients"][clients])
    finally:
        alone.close()
    return table | {"machine": measure.machine(torch.device("cpu"))}


def _compared(
    place: Place, alone: Synthesizer, asked: list[dict[str, Any]], clients: int, rounds: int
) -> dict[str, Any]:
    seen: dict[str, list[list[Spoken]]] = {"endpoint": [], "alone": []}
    rivals = {
        "alone": lambda: seen["alone"].append(asyncio.run(_in_process(alone, asked, clients))),
        "endpoint": lambda: seen["endpoint"].append(asyncio.run(_over_http(place, asked, clients))),
    }
    timings = measure.in_turn(rivals, rounds, torch.device("cpu"))
    row: dict[str, Any] = {"audio_s": round(sum(one.audio_s for one in seen["endpoint"][0]), 2)}
    for name, passes in seen.items():
        # The first pass is the one that does not count.
        counted = [one for spoken in passes[1:] for one in spoken]
        firsts = sorted(one.first_audio_s for one in counted)
        row[name] = {
            "first_audio_ms": round(1000 * statistics.median(firsts), 1),
            "first_audio_ms_p95": round(1000 * firsts[int(0.95 * (len(firsts) - 1))], 1),
            "real_time_factor": round(statistics.median(one.total_s / one.audio_s for one in counted), 3),
            "audio_s_per_s": timings[name].rate(row["audio_s"]),
        }
    pairs = [
        (theirs.total_s - ours.total_s, theirs.first_audio_s - ours.first_audio_s)
        for over, inside in zip(seen["endpoint"][1:], seen["alone"][1:], strict=True)
        for theirs, ours in zip(over, inside, strict=True)
    ]
    row["overhead_ms"] = round(1000 * statistics.median(total for total, _ in pairs), 1)
    row["first_audio_overhead_ms"] = round(1000 * statistics.median(first for _, first in pairs), 1)
    row["share_of_alone"] = round(timings["alone"].median_s / timings["endpoint"].median_s, 3)
    return row


async def _overhead(place: Place, alone: Synthesizer, rounds: int) -> dict[str, float]:
    """Milliseconds that a short request takes longer over HTTP; the lowest tenth of each, so that whatever else the
    machine does counts little."""
    body = {"input": "Well.", "seed": 1, "max_frames": 10, "response_format": "pcm"}
    alone_s, endpoint_s = [], []
    async with open_session() as session:
        for _ in range(rounds):
            alone_s.append((await _spoken_alone(alone, body)).total_s)
            endpoint_s.append((await _spoken_over_http(session, place, body)).total_s)
    low_alone_s, low_endpoint_s = (sorted(one)[len(one) // 10] for one in (alone_s, endpoint_s))
    return {
        "ms": round(1000 * (low_endpoint_s - low_alone_s), 2),
        "alone_ms": round(1000 * low_alone_s, 2),
        "endpoint_ms": round(1000 * low_endpoint_s, 2),
        "median_ms": round(1000 * (statistics.median(endpoint_s) - statistics.median(alone_s)), 2),
    }


async def _in_process(alone: Synthesizer, asked: Sequence[dict[str, Any]], clients: int) -> list[Spoken]:
    return await _by_clients(lambda body: _spoken_alone(alone, body), asked, clients)


async def _over_http(place: Place, asked: Sequence[dict[str, Any]], clients: int) -> list[Spoken]:
    async with open_session() as session:
        return await _by_clients(lambda body: _spoken_over_http(session, place, body), asked, clients)


async def _spoken_alone(alone: Synthesizer, body: dict[str, Any]) -> Spoken:
    start, first, samples = time.perf_counter(), 0.0, 0
    row = {"id": "x", "text": body["input"], "seed": body["seed"], "max_frames": body["max_frames"]}
    plan = await asyncio.to_thread(alone.plan, Script.model_validate(row))
    async for piece in alone.stream(plan, live=True):
        samples += len(piece.samples_N)
        first = first or (time.perf_counter() - start if samples else 0.0)
    return Spoken(first, time.perf_counter() - start, samples / alone.sample_rate)


async def _spoken_over_http(session: aiohttp.ClientSession, place: Place, body: dict[str, Any]) -> Spoken:
    start, first, size = time.perf_counter(), 0.0, 0
    async with session.post(f"{place.url}/v1/audio/speech", json=body) as answer:
        answer.raise_for_status()
        async for part in answer.content.iter_any():
            size += len(part)
            first = first or time.perf_counter() - start
        rate = int(answer.headers["x-sample-rate"])
    return Spoken(first, time.perf_counter() - start, size / 2 / rate)


async def _by_clients(speak: Speak, asked: Sequence[dict[str, Any]], clients: int) -> list[Spoken]:
    """All requests, by so many clients of whom each asks for the next when it has its answer."""
    found: dict[int, Spoken] = {}
    waiting = iter(enumerate(asked))

    async def client() -> None:
        for number, body in waiting:
            found[number] = await speak(body)

    await asyncio.gather(*(client() for _ in range(clients)))
    return [found[number] for number in range(len(asked))]


def _report(clients: int, row: dict[str, Any]) -> None:
    for name in ("alone", "endpoint"):
        one = row[name]
        rate = one["audio_s_per_s"]
        print(
            f"{clients:3d} clients {name:>9}: first audio {one['first_audio_ms']:7.1f} ms "
            f"(p95 {one['first_audio_ms_p95']:7.1f}), real-time factor {one['real_time_factor']:.3f}, "
            f"{rate['median']:.1f} ({rate['lowest']:.1f}–{rate['highest']:.1f}) audio s/s"
        )
    print(
        f"            {row['overhead_ms']} ms more a request, {row['first_audio_overhead_ms']} ms more to the first, "
        f"{row['share_of_alone']:.1%} of the rate alone"
    )
