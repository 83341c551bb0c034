"""Runs an engine in a thread of its own, with an asyncio interface.

    async for update in EngineLoop(engine).generate(request): ...

Only that thread touches the engine: requests and cancellations reach it through a command queue, and updates return
through the event loop of the caller. When the engine fails, every waiting and every later caller gets `EngineStopped`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
from collections.abc import AsyncGenerator, Callable

import torch

from higgs_model.engine.engine import Engine
from higgs_model.engine.request import FinishReason, Request, Update


class EngineStopped(RuntimeError):
    """The engine no longer runs; not caused by the request. `__cause__` is the error that stopped it, if any."""


@dataclasses.dataclass(frozen=True)
class _Client:
    """A caller waiting for the updates of a request."""

    request: Request
    event_loop: asyncio.AbstractEventLoop
    messages: asyncio.Queue[Update | Exception]

    def send(self, message: Update | Exception) -> None:
        # If the event loop is closed, no one is waiting any more.
        with contextlib.suppress(RuntimeError):
            self.event_loop.call_soon_threadsafe(self.messages.put_nowait, message)


class EngineLoop:
    """Runs an engine until `close`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._clients: dict[str, _Client] = {}
        self._error: Exception | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: Request) -> AsyncGenerator[Update]:
        """Yield a request's updates; the last one has a finish reason.

        Closing the iterator (`contextlib.aclosing`) cancels the request at once; an iterator that is dropped without
        closing is cancelled when it is garbage-collected.

        Raises:
            BadInput: the request can never run.
            EngineStopped: the engine is closed or has failed.
        """
        client = _Client(request, asyncio.get_running_loop(), asyncio.Queue())
        self._commands.put(lambda: self._add(client))
        if self._closed.is_set():
            raise EngineStopped("the engine is stopped") from self._error
        finished = False
        try:
            while not finished:
                message = await client.messages.get()
                if isinstance(message, Exception):
                    finished = True
                    raise message
                finished = message.finish_reason is not None
                yield message
        finally:
            if not finished:
                self._commands.put(lambda: self._cancel(client))

    def close(self) -> None:
        """Stop after the current step; waiting callers get `EngineStopped`."""
        self._commands.put(None)
        self._thread.join()

    # ------------------------------------------------------------------ in the engine's thread

    def _run(self) -> None:
        device = self.engine.device
        # The thread counts of OpenMP and MKL are per thread, and a new thread would use their defaults.
        torch.set_num_threads(torch.get_num_threads())
        try:
            # The current device is per thread, too.
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                while self._run_commands():
                    for update in self.engine.step():
                        self._deliver(update)
        except Exception as error:  # noqa: BLE001  (any failure must reach the callers)
            self._error = error
        self._closed.set()
        stopped = EngineStopped(f"the engine is stopped: {self._error or 'it was closed'}")
        stopped.__cause__ = self._error
        self._run_commands(last=True)
        for client in self._clients.values():
            client.send(stopped)

    def _run_commands(self, *, last: bool = False) -> bool:
        """Run the queued commands, waiting for one if the engine is idle; False when asked to stop."""
        while True:
            try:
                command = self._commands.get(block=not (last or self.engine.has_work))
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _add(self, client: _Client) -> None:
        if self._closed.is_set():
            client.send(EngineStopped("the engine is stopped"))
            return
        try:
            self.engine.add(client.request)
        except Exception as error:  # noqa: BLE001  (an invalid request must not stop the engine)
            client.send(error)
            return
        self._clients[client.request.id] = client

    def _cancel(self, client: _Client) -> None:
        if self._clients.get(client.request.id) is client and not self._closed.is_set():
            del self._clients[client.request.id]
            self.engine.cancel(client.request.id)

    def _deliver(self, update: Update) -> None:
        if update.finish_reason is FinishReason.CANCELLED:
            # Its caller is gone, and a new request may have the same id by now.
            return
        client = self._clients[update.request_id]
        if update.finish_reason is not None:
            del self._clients[update.request_id]
        client.send(update)
