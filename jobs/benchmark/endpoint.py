"""Run the HTTP endpoint in its own process for a benchmark.

In: a checkpoint and settings. Out: a `RunningEndpoint` with its URL and process id, for the duration of a `with` block.
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

_STARTUP_TIMEOUT_S = 300.0


@dataclasses.dataclass(frozen=True)
class RunningEndpoint:
    """A running endpoint.

    Attributes:
        url: base URL.
        pid: process id of `serve run`, the ancestor of all other processes.
        folder: temporary folder with its log.
    """

    url: str
    pid: int
    folder: Path


@contextlib.contextmanager
def run_endpoint(model: str, slots: int, queued: int, proxy: str) -> Iterator[RunningEndpoint]:
    """Start `serve run` with its own Ray cluster, wait until it is ready, and stop it on exit.

    Args:
        model: checkpoint.
        slots: concurrent requests of the engine.
        queued: maximum number of queued requests.
        proxy: `haproxy`, or Serve's own proxy for any other value.

    Raises:
        RuntimeError: the endpoint is not ready within five minutes, or exits.
    """
    with tempfile.TemporaryDirectory(prefix="higgs-") as name:
        folder = Path(name)
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
        settings = {"model": model, "max_batch": slots, "max_queued": queued, "cpus_per_replica": 0.5}
        application = {"name": "default", "import_path": "serve.app:app", "route_prefix": "/", "args": settings}
        config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
        (folder / "serve.yaml").write_text(json.dumps(config))
        environment = {
            **{"RAY_ADDRESS": "local", "RAY_TMPDIR": name, "RAY_USAGE_STATS_ENABLED": "0"},
            "RAY_SERVE_ENABLE_HA_PROXY": str(int(proxy == "haproxy")),
            # By default Ray's workers have a lower priority than other processes, such as the in-process synthesizer
            # that they are compared with.
            "RAY_worker_niceness": "0",
            # The cluster listens on the loopback interface only, and this process queries its metrics.
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
        endpoint = RunningEndpoint(f"http://127.0.0.1:{port}", process.pid, folder)
        try:
            asyncio.run(_wait_until_ready(endpoint, process))
            yield endpoint
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            for pid in [*descendants(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(10)


async def _wait_until_ready(endpoint: RunningEndpoint, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _STARTUP_TIMEOUT_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{endpoint.url}/healthz", timeout=aiohttp.ClientTimeout(10)) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.5)
    raise RuntimeError(
        f"the endpoint did not start; the end of its log:\n{(endpoint.folder / 'log').read_text()[-3000:]}"
    )


def descendants(pid: int) -> list[int]:
    """Return the ids of all descendants of a process, deepest first."""
    children = collections.defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children[int(path.read_text().rpartition(")")[2].split()[1])].append(int(path.parent.name))

    def walk(parent: int) -> Iterator[int]:
        for child in children[parent]:
            yield from walk(child)
            yield child

    return list(walk(pid))


def ray_address(endpoint: RunningEndpoint) -> str:
    """Return the address of the endpoint's Ray cluster, from the command lines of its processes."""
    for pid in descendants(endpoint.pid):
        with contextlib.suppress(OSError):
            for word in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0"):
                if word.startswith("--gcs-address="):
                    return word.removeprefix("--gcs-address=")
    raise RuntimeError("no process of the endpoint has --gcs-address; Ray is not running")


@contextlib.asynccontextmanager
async def open_session() -> AsyncIterator[aiohttp.ClientSession]:
    """Open an HTTP client without a limit on connections."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session
