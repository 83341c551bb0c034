"""The endpoint as a process of its own, for benchmarks: `serve run` from its start to its end, and how it is asked.

In: a checkpoint's name and settings. Out: a `Place`: where it answers, and which processes it is.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp

_START_S = 300.0


@dataclasses.dataclass(frozen=True)
class Place:
    """A running endpoint."""

    url: str
    pid: int
    folder: Path


@contextlib.contextmanager
def endpoint(model: str, slots: int, queued: int, proxy: str) -> Iterator[Place]:
    """`serve run` with a Ray of its own, from its start to its end."""
    with tempfile.TemporaryDirectory(prefix="higgs-") as name:
        folder = Path(name)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        settings = {"model": model, "max_batch": slots, "max_queued": queued, "cpus_per_replica": 0.5}
        application = {"name": "default", "import_path": "serve.app:app", "route_prefix": "/", "args": settings}
        config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
        (folder / "serve.yaml").write_text(json.dumps(config))
        environment = {
            **{"RAY_ADDRESS": "local", "RAY_TMPDIR": name, "RAY_USAGE_STATS_ENABLED": "0"},
            "RAY_SERVE_ENABLE_HA_PROXY": str(int(proxy == "haproxy")),
            # Else everything else on the machine goes before Ray's workers, and the synthesizer alone is none of them.
            "RAY_worker_niceness": "0",
            # It listens on the loopback, and is asked for its numbers by this process.
            "RAY_AUTH_MODE": "disabled",
        }
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "ray.serve.scripts", "run", str(folder / "serve.yaml")],
                env=os.environ | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        place = Place(f"http://127.0.0.1:{port}", process.pid, folder)
        try:
            asyncio.run(_until_ready(place, process))
            yield place
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            for pid in [*children(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(10)


async def _until_ready(place: Place, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{place.url}/healthz", timeout=aiohttp.ClientTimeout(10)) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.5)
    raise RuntimeError(f"the endpoint did not start:\n{(place.folder / 'log').read_text()[-3000:]}")


def children(pid: int) -> list[int]:
    """All processes under one, deepest first."""
    parents = collections.defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.read_text().rpartition(")")[2].split()[1])].append(int(path.parent.name))

    def under(parent: int) -> Iterator[int]:
        for child in parents[parent]:
            yield from under(child)
            yield child

    return list(under(pid))


def ray_address(place: Place) -> str:
    """Of the Ray that the endpoint has started, as its node was told."""
    for pid in children(place.pid):
        with contextlib.suppress(OSError):
            for word in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0"):
                if word.startswith("--gcs-address="):
                    return word.removeprefix("--gcs-address=")
    raise RuntimeError("the endpoint runs no Ray")


@contextlib.asynccontextmanager
async def open_session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client of as many connections as are wanted."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session
