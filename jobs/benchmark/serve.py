"""The endpoint over HTTP on the loopback interface, compared with the same synthesizer called in this process.

`serve run serve.app:app` runs in its own process. Both synthesize the same texts with the same seeds, alternately, for
1, 4, 16 and 64 concurrent clients. With `--soak`: many clients for a while, half of which disconnect early.
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
from jobs.benchmark.endpoint import RunningEndpoint, open_session, run_endpoint
from jobs.benchmark.soak import SENTENCE, soak


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    checkpoint.add_arguments(parser)
    parser.add_argument("--slots", type=int, default=16, help="concurrent requests of the engine")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers of concurrent clients")
    parser.add_argument("--requests", type=int, default=64, help="requests per round, at most 16 per client")
    parser.add_argument("--frames", type=int, default=250, help="frames of the longest response; the shortest has 1/5")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds")
    parser.add_argument("--proxy", choices=["haproxy", "python"], default="haproxy", help="Ray Serve's HTTP proxy")
    parser.add_argument(
        "--soak", type=float, default=0, metavar="SECONDS", help="instead: clients half of which disconnect early"
    )
    parser.add_argument("--soak-clients", type=int, default=200, help="concurrent clients with --soak")
    parser.add_argument("--quick", action="store_true", help="one short round, as a smoke test")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    if arguments.quick:
        arguments.clients, arguments.requests, arguments.frames, arguments.rounds = [1, 4], 8, 50, 1
        arguments.hidden_size, arguments.layers = 64, 2
    with tempfile.TemporaryDirectory(prefix="higgs-") as folder:
        arguments.model = checkpoint.resolve_checkpoint(arguments, Path(folder))
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    machine = measure.describe_machine(torch.device("cpu"))
    print(f"{arguments.model}, {arguments.slots} slots, {arguments.proxy}, {machine}")
    queued = 32 if arguments.soak else max(arguments.clients)
    with run_endpoint(arguments.model, arguments.slots, queued, arguments.proxy) as endpoint:
        if arguments.soak:
            return asyncio.run(soak(endpoint, arguments.soak, arguments.soak_clients))
        return compare(endpoint, arguments)


@dataclasses.dataclass(frozen=True)
class RequestTiming:
    """Latency of one request as its client observes it, and the seconds of audio received."""

    first_audio_s: float
    total_s: float
    audio_s: float


SendRequest = Callable[[dict[str, Any]], Awaitable[RequestTiming]]


def build_requests(count: int, longest: int) -> list[dict[str, Any]]:
    """Return request bodies of uneven length, up to `longest` frames, each with a different seed."""
    draw = random.Random(0)
    return [
        {
            "input": SENTENCE * draw.randint(1, 4),
            "seed": number,
            "max_frames": round(longest * 5 ** -draw.random()),
            "response_format": "pcm",
        }
        for number in range(count)
    ]


def compare(endpoint: RunningEndpoint, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the endpoint and an in-process synthesizer alternately, for each number of clients."""
    in_process = Synthesizer.from_pretrained(
        arguments.model, engine=EngineSettings(max_slots=arguments.slots), settings=SynthesisSettings()
    )
    table: dict[str, Any] = {
        "model": arguments.model,
        "slots": arguments.slots,
        "proxy": arguments.proxy,
        "by_clients": {},
    }
    try:
        table["overhead"] = asyncio.run(_measure_overhead(endpoint, in_process, 5 if arguments.quick else 100))
        print(f"overhead of a short request: {table['overhead']}")
        for clients in arguments.clients:
            bodies = build_requests(min(arguments.requests, 16 * clients), arguments.frames)
            table["by_clients"][clients] = _measure(endpoint, in_process, bodies, clients, arguments.rounds)
            _print_row(clients, table["by_clients"][clients])
    finally:
        in_process.close()
    return table | {"machine": measure.describe_machine(torch.device("cpu"))}


def _measure(
    endpoint: RunningEndpoint, in_process: Synthesizer, bodies: list[dict[str, Any]], clients: int, rounds: int
) -> dict[str, Any]:
    requests: dict[str, list[list[RequestTiming]]] = {"endpoint": [], "alone": []}
    contenders = {
        "alone": lambda: requests["alone"].append(asyncio.run(_send_all_in_process(in_process, bodies, clients))),
        "endpoint": lambda: requests["endpoint"].append(asyncio.run(_send_all_over_http(endpoint, bodies, clients))),
    }
    timings = measure.time_interleaved(contenders, rounds, torch.device("cpu"))
    row: dict[str, Any] = {"audio_s": round(sum(request.audio_s for request in requests["endpoint"][0]), 2)}
    for name, passes in requests.items():
        # The first pass is the warm-up.
        counted = [request for counted_pass in passes[1:] for request in counted_pass]
        first_audio_s = sorted(request.first_audio_s for request in counted)
        row[name] = {
            "first_audio_ms": round(1000 * statistics.median(first_audio_s), 1),
            "first_audio_ms_p95": round(1000 * first_audio_s[int(0.95 * (len(first_audio_s) - 1))], 1),
            "real_time_factor": round(statistics.median(request.total_s / request.audio_s for request in counted), 3),
            "audio_s_per_s": timings[name].rate(row["audio_s"]),
        }
    overheads = [
        (http.total_s - alone.total_s, http.first_audio_s - alone.first_audio_s)
        for http_pass, alone_pass in zip(requests["endpoint"][1:], requests["alone"][1:], strict=True)
        for http, alone in zip(http_pass, alone_pass, strict=True)
    ]
    row["overhead_ms"] = round(1000 * statistics.median(total_s for total_s, _ in overheads), 1)
    row["first_audio_overhead_ms"] = round(1000 * statistics.median(first_s for _, first_s in overheads), 1)
    row["share_of_alone"] = round(timings["alone"].median_s / timings["endpoint"].median_s, 3)
    return row


async def _measure_overhead(endpoint: RunningEndpoint, in_process: Synthesizer, rounds: int) -> dict[str, float]:
    """Return the milliseconds that HTTP adds to a short request.

    `ms` is the difference of the 10th percentiles, which other load on the machine affects little.
    """
    body = {"input": "Well.", "seed": 1, "max_frames": 10, "response_format": "pcm"}
    alone_s, endpoint_s = [], []
    async with open_session() as session:
        for _ in range(rounds):
            alone_s.append((await _send_in_process(in_process, body)).total_s)
            endpoint_s.append((await _send_over_http(session, endpoint, body)).total_s)
    low_alone_s, low_endpoint_s = (sorted(times_s)[len(times_s) // 10] for times_s in (alone_s, endpoint_s))
    return {
        "ms": round(1000 * (low_endpoint_s - low_alone_s), 2),
        "alone_ms": round(1000 * low_alone_s, 2),
        "endpoint_ms": round(1000 * low_endpoint_s, 2),
        "median_ms": round(1000 * (statistics.median(endpoint_s) - statistics.median(alone_s)), 2),
    }


async def _send_all_in_process(
    in_process: Synthesizer, bodies: Sequence[dict[str, Any]], clients: int
) -> list[RequestTiming]:
    return await _send_all(lambda body: _send_in_process(in_process, body), bodies, clients)


async def _send_all_over_http(
    endpoint: RunningEndpoint, bodies: Sequence[dict[str, Any]], clients: int
) -> list[RequestTiming]:
    async with open_session() as session:
        return await _send_all(lambda body: _send_over_http(session, endpoint, body), bodies, clients)


async def _send_in_process(in_process: Synthesizer, body: dict[str, Any]) -> RequestTiming:
    start_s, first_audio_s, samples = time.perf_counter(), 0.0, 0
    row = {"id": "x", "text": body["input"], "seed": body["seed"], "max_frames": body["max_frames"]}
    plan = await asyncio.to_thread(in_process.plan, Script.model_validate(row))
    async for piece in in_process.stream(plan, live=True):
        samples += len(piece.samples_N)
        first_audio_s = first_audio_s or (time.perf_counter() - start_s if samples else 0.0)
    return RequestTiming(first_audio_s, time.perf_counter() - start_s, samples / in_process.sample_rate)


async def _send_over_http(
    session: aiohttp.ClientSession, endpoint: RunningEndpoint, body: dict[str, Any]
) -> RequestTiming:
    start_s, first_audio_s, num_bytes = time.perf_counter(), 0.0, 0
    async with session.post(f"{endpoint.url}/v1/audio/speech", json=body) as response:
        response.raise_for_status()
        async for part in response.content.iter_any():
            num_bytes += len(part)
            first_audio_s = first_audio_s or time.perf_counter() - start_s
        sample_rate = int(response.headers["x-sample-rate"])
    return RequestTiming(first_audio_s, time.perf_counter() - start_s, num_bytes / 2 / sample_rate)


async def _send_all(send: SendRequest, bodies: Sequence[dict[str, Any]], clients: int) -> list[RequestTiming]:
    """Send all requests from concurrent clients, each of which sends its next request after a response."""
    timings: dict[int, RequestTiming] = {}
    pending = iter(enumerate(bodies))

    async def run_client() -> None:
        for number, body in pending:
            timings[number] = await send(body)

    await asyncio.gather(*(run_client() for _ in range(clients)))
    return [timings[number] for number in range(len(bodies))]


def _print_row(clients: int, row: dict[str, Any]) -> None:
    for name in ("alone", "endpoint"):
        values = row[name]
        rate = values["audio_s_per_s"]
        print(
            f"{clients:3d} clients {name:>9}: first audio {values['first_audio_ms']:7.1f} ms "
            f"(p95 {values['first_audio_ms_p95']:7.1f}), real-time factor {values['real_time_factor']:.3f}, "
            f"{rate['median']:.1f} ({rate['lowest']:.1f}–{rate['highest']:.1f}) audio s/s"
        )
    print(
        f"            HTTP: {row['overhead_ms']:+} ms per request, {row['first_audio_overhead_ms']:+} ms to first audio"
        f", {row['share_of_alone']:.1%} of the rate in process"
    )
