"""An engine in a thread of its own, with an asyncio face.

    async for frames in EngineLoop(engine).generate(request): ...

Everything that touches the engine happens in that thread; requests and cancellations are mailed to it, updates are
mailed back to the event loop that waits for them. When the engine itself breaks, everybody who waits gets
`EngineStopped`, and so does everybody who asks later.
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
    """The engine no longer runs; what broke it is the cause. Nobody's input is to blame."""


@dataclasses.dataclass(frozen=True)
class _Client:
    """Somebody who waits for a request's updates."""

    request: Request
    events: asyncio.AbstractEventLoop
    mailbox: asyncio.Queue[Update | Exception]

    def tell(self, news: Update | Exception) -> None:
        # A closed event loop: nobody waits any more.
        with contextlib.suppress(RuntimeError):
            self.events.call_soon_threadsafe(self.mailbox.put_nowait, news)


class EngineLoop:
    """Runs an engine until `close`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._letters: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._clients: dict[str, _Client] = {}
        self._broken: Exception | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: Request) -> AsyncGenerator[Update]:
        """Updates of a request as they come; the last one says how it ended.

        Whoever stops listening cancels it: at once when the iterator is closed (`contextlib.aclosing`), else when
        Python gets round to it.

        Raises:
            BadInput: the request can never run.
            EngineStopped: the engine is closed or broken.
        """
        client = _Client(request, asyncio.get_running_loop(), asyncio.Queue())
        self._letters.put(lambda: self._add(client))
        if self._closed.is_set():
            raise EngineStopped("the engine is stopped") from self._broken
        ended = False
        try:
            while not ended:
                news = await client.mailbox.get()
                if isinstance(news, Exception):
                    ended = True
                    raise news
                ended = news.finish_reason is not None
                yield news
        finally:
            if not ended:
                self._letters.put(lambda: self._cancel(client))

    def close(self) -> None:
        """Stop after the step under way; whoever still waits is told."""
        self._letters.put(None)
        self._thread.join()

    # ------------------------------------------------------------------ in the engine's thread

    def _run(self) -> None:
        device = self.engine.device
        torch.set_num_threads(torch.get_num_threads())  # OpenMP and MKL would give each thread a number of its own
        try:
            # A thread begins with the first device of all.
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                while self._read_letters():
                    for update in self.engine.step():
                        self._deliver(update)
        except Exception as error:  # noqa: BLE001  (whatever it is, those who wait must hear of it)
            self._broken = error
        self._closed.set()
        stopped = EngineStopped(f"the engine is stopped: {self._broken or 'it was closed'}")
        stopped.__cause__ = self._broken
        self._read_letters(last=True)
        for client in self._clients.values():
            client.tell(stopped)

    def _read_letters(self, *, last: bool = False) -> bool:
        """Do what was asked for meanwhile, waiting while there is no work; False when asked to stop."""
        while True:
            try:
                letter = self._letters.get(block=not (last or self.engine.has_work))
            except queue.Empty:
                return True
            if letter is None:
                return False
            letter()

    def _add(self, client: _Client) -> None:
        if self._closed.is_set():
            client.tell(EngineStopped("the engine is stopped"))
            return
        try:
            self.engine.add(client.request)
        except Exception as error:  # noqa: BLE001  (a request that cannot even be looked at is no fault of the engine)
            client.tell(error)
            return
        self._clients[client.request.id] = client

    def _cancel(self, client: _Client) -> None:
        if self._clients.get(client.request.id) is client and not self._closed.is_set():
            del self._clients[client.request.id]
            self.engine.cancel(client.request.id)

    def _deliver(self, update: Update) -> None:
        if update.finish_reason is FinishReason.CANCELLED:
            # Nobody listens; somebody else may have come with the same id since.
            return
        client = self._clients[update.request_id]
        if update.finish_reason is not None:
            del self._clients[update.request_id]
        client.tell(update)
