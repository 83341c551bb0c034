"""Load a running endpoint with many clients for a while, half of which disconnect early.

In: a running endpoint. Out: counts of outcomes, memory of its processes over time, and the engine's load afterwards.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import random
import time
from pathlib import Path
from typing import Any

import aiohttp

from jobs.benchmark.endpoint import RunningEndpoint, descendants, open_session, ray_address

SENTENCE = "The miller's daughter went down to the river before the sun was up. "
_DRAIN_TIMEOUT_S = 30


async def soak(endpoint: RunningEndpoint, seconds: float, clients: int) -> dict[str, Any]:
    """Run clients that send requests in a loop and abandon half of them, and return what was observed."""
    deadline = time.monotonic() + seconds
    outcomes: collections.Counter[str] = collections.Counter()
    memory: list[dict[str, float]] = []
    async with open_session() as session:
        sampling = asyncio.create_task(_sample_memory(endpoint, seconds, outcomes, memory))
        await asyncio.gather(*(_run_client(session, endpoint, number, deadline, outcomes) for number in range(clients)))
        await sampling
    afterwards = await asyncio.to_thread(_engine_metrics_after, endpoint)
    print(f"{clients} clients for {seconds:.0f} s: {dict(outcomes)}; afterwards {afterwards}")
    return {
        "soak_s": seconds,
        "clients": clients,
        "outcomes": dict(outcomes),
        "memory_mb": memory,
        "afterwards": afterwards,
    }


async def _run_client(
    session: aiohttp.ClientSession,
    endpoint: RunningEndpoint,
    number: int,
    deadline: float,
    outcomes: collections.Counter[str],
) -> None:
    draw = random.Random(number)
    while time.monotonic() < deadline:
        body = {"input": SENTENCE, "seed": draw.randrange(1000), "max_frames": draw.randint(40, 150)}
        body |= {"response_format": draw.choice(["pcm", "mp3", "opus", "wav"])}
        # Half of the requests are abandoned: some while queued, some after the first audio.
        abandon = draw.choice([None, None, "queue", "stream"])
        try:
            async with asyncio.timeout(draw.uniform(0, 3) if abandon == "queue" else None):
                async with session.post(f"{endpoint.url}/v1/audio/speech", json=body) as response:
                    retry_after_s = float(response.headers.get("retry-after", 0))
                    expected = response.status in (200, 429, 503)
                    outcome = str(response.status) if expected else (await response.text())[:200]
                    if response.status == 200 and abandon == "stream":
                        await response.content.readany()
                        await asyncio.sleep(draw.uniform(0, 0.3))
                        response.close()
                        outcome = "left the stream"
                    else:
                        await response.read()
        except TimeoutError:
            outcome, retry_after_s = "left the queue", 0.0
        except (aiohttp.ClientError, OSError) as error:
            outcome, retry_after_s = type(error).__name__, 0.0
        outcomes[outcome] += 1
        await asyncio.sleep(min(retry_after_s, 5.0) * draw.uniform(0.5, 1.0))


async def _sample_memory(
    endpoint: RunningEndpoint, seconds: float, outcomes: collections.Counter[str], memory: list[dict[str, float]]
) -> None:
    """Append the memory of the endpoint's processes ten times."""
    for sample in range(1, 11):
        await asyncio.sleep(seconds / 10)
        used = await asyncio.to_thread(_memory_mb, endpoint)
        memory.append({"at_s": round(sample * seconds / 10), **used})
        print(memory[-1], dict(outcomes), flush=True)


def _memory_mb(endpoint: RunningEndpoint) -> dict[str, float]:
    """Return the resident memory in MiB of the processes on a request's path, by the names that Ray sets."""
    memory_mb: dict[str, float] = {}
    for pid in descendants(endpoint.pid):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            for name in ("Ingress", "Synthesizer", "ProxyActor"):
                if title.startswith("ray::") and name in title:
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                    memory_mb[name] = round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    return memory_mb


def _engine_metrics_after(endpoint: RunningEndpoint) -> dict[str, float]:
    """Return the engine's load once it is idle, or after a timeout, queried through Ray."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    from ray import serve

    ray.init(address=ray_address(endpoint), namespace="serve", log_to_driver=False, configure_logging=False)
    try:
        handle = serve.get_deployment_handle("Synthesizer", "default").metrics
        deadline = time.monotonic() + _DRAIN_TIMEOUT_S
        while True:
            metrics: dict[str, float] = handle.remote().result(timeout_s=_DRAIN_TIMEOUT_S)
            load = {name: metrics[name] for name in ("running", "queued", "kv_blocks_used", "finished_cancelled")}
            if not (load["running"] or load["queued"] or load["kv_blocks_used"]) or time.monotonic() > deadline:
                return load
            time.sleep(0.2)
    finally:
        ray.shutdown()
