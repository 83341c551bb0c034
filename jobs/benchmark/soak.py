"""Many clients for a while, half of whom go away in the middle: what they were told, and what is left behind.

In: a running endpoint. Out: counts of answers, the memory of its processes over time, what its engine holds afterwards.
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

from jobs.benchmark.endpoint import Place, children, open_session, ray_address

SENTENCE = "The miller's daughter went down to the river before the sun was up. "
_PATIENCE_S = 30


async def soak(place: Place, seconds: float, clients: int) -> dict[str, Any]:
    """Clients that ask again and again; half of their requests are left in the middle."""
    until = time.monotonic() + seconds
    outcomes: collections.Counter[str] = collections.Counter()
    memory: list[dict[str, float]] = []
    async with open_session() as session:
        watch = asyncio.create_task(_watched(place, seconds, outcomes, memory))
        asking = [_asking(session, place, number, until, outcomes) for number in range(clients)]
        await asyncio.gather(*asking)
        await watch
    left = await asyncio.to_thread(_what_is_left, place)
    print(f"{clients} clients for {seconds:.0f} s: {dict(outcomes)}; afterwards {left}")
    return {"soak_s": seconds, "clients": clients, "outcomes": dict(outcomes), "memory_mb": memory, "afterwards": left}


async def _asking(
    session: aiohttp.ClientSession, place: Place, number: int, until: float, outcomes: collections.Counter[str]
) -> None:
    drawn = random.Random(number)
    while time.monotonic() < until:
        body = {"input": SENTENCE, "seed": drawn.randrange(1000), "max_frames": drawn.randint(40, 150)}
        body |= {"response_format": drawn.choice(["pcm", "mp3", "opus", "wav"])}
        # Half go away: some while they wait, some when they have heard the beginning.
        leaves = drawn.choice([None, None, "queue", "stream"])
        try:
            async with asyncio.timeout(drawn.uniform(0, 3) if leaves == "queue" else None):
                async with session.post(f"{place.url}/v1/audio/speech", json=body) as answer:
                    after = float(answer.headers.get("retry-after", 0))
                    known = answer.status in (200, 429, 503)
                    outcome = str(answer.status) if known else (await answer.text())[:200]
                    if answer.status == 200 and leaves == "stream":
                        await answer.content.readany()
                        await asyncio.sleep(drawn.uniform(0, 0.3))
                        answer.close()
                        outcome = "left the stream"
                    else:
                        await answer.read()
        except TimeoutError:
            outcome, after = "left the queue", 0.0
        except (aiohttp.ClientError, OSError) as error:
            outcome, after = type(error).__name__, 0.0
        outcomes[outcome] += 1
        await asyncio.sleep(min(after, 5.0) * drawn.uniform(0.5, 1.0))


async def _watched(
    place: Place, seconds: float, outcomes: collections.Counter[str], memory: list[dict[str, float]]
) -> None:
    """Memory of the endpoint's processes, ten times."""
    for mark in range(1, 11):
        await asyncio.sleep(seconds / 10)
        used = await asyncio.to_thread(_memory_mb, place)
        memory.append({"at_s": round(mark * seconds / 10), **used})
        print(memory[-1], dict(outcomes), flush=True)


def _memory_mb(place: Place) -> dict[str, float]:
    """Resident megabytes of the processes that a request passes, by what Ray calls them."""
    found: dict[str, float] = {}
    for pid in children(place.pid):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            for name in ("Ingress", "Synthesizer", "ProxyActor"):
                if title.startswith("ray::") and name in title:
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                    found[name] = round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    return found


def _what_is_left(place: Place) -> dict[str, float]:
    """What the engine holds when everybody has gone, asked through Ray."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    from ray import serve

    ray.init(address=ray_address(place), namespace="serve", log_to_driver=False, configure_logging=False)
    try:
        numbers = serve.get_deployment_handle("Synthesizer", "default").metrics
        end = time.monotonic() + _PATIENCE_S
        while True:
            found: dict[str, float] = numbers.remote().result(timeout_s=_PATIENCE_S)
            kept = {name: found[name] for name in ("running", "queued", "kv_blocks_used", "finished_cancelled")}
            if not (kept["running"] or kept["queued"] or kept["kv_blocks_used"]) or time.monotonic() > end:
                return kept
            time.sleep(0.2)
    finally:
        ray.shutdown()
