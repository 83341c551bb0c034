"""Batches small asynchronous calls that are cheaper to process together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class CallBatcher(Generic[Item, Result]):
    """Collects the items of concurrent calls for a short time and processes them in one call.

    Args:
        process: function of a batch of items that returns one result per item, in order.
        delay_s: how long to collect items after the first one.
    """

    def __init__(self, process: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]], delay_s: float) -> None:
        self._process, self.delay_s = process, delay_s
        self._items: list[tuple[Item, asyncio.Future[Result]]] = []
        self._next_batch: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def call(self, item: Item) -> Result:
        """Return the result of one item, or raise the error that its batch raised."""
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._items.append((item, result))
        if self._next_batch is None:
            self._next_batch = asyncio.create_task(self._process_batch())
            self._tasks.add(self._next_batch)
            self._next_batch.add_done_callback(self._tasks.discard)
        return await result

    async def drain(self) -> None:
        """Wait until every item has been processed, whether or not its caller still waits; raises nothing."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _process_batch(self) -> None:
        await asyncio.sleep(self.delay_s)
        items, self._items, self._next_batch = self._items, [], None
        try:
            results = await self._process([item for item, _ in items])
        except BaseException as error:
            for _, future in items:
                if not future.done():
                    future.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), result in zip(items, results, strict=True):
            if not future.done():
                future.set_result(result)
