"""Small things that come one at a time and are cheaper done together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batched(Generic[Item, Answer]):
    """Gathers what is added within a moment, does it in one call, and gives each its own answer.

    Args:
        do: answers for items, in their order.
        pause_s: the moment.
    """

    def __init__(self, do: Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]], pause_s: float) -> None:
        self._do, self.pause_s = do, pause_s
        self._items: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._soon: asyncio.Task[None] | None = None
        self._doing: set[asyncio.Task[None]] = set()

    async def add(self, item: Item) -> Answer:
        """The answer for one item; raises what doing all of them raised."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._items.append((item, answer))
        if self._soon is None:
            self._soon = asyncio.create_task(self._after_a_moment())
            self._doing.add(self._soon)
            self._soon.add_done_callback(self._doing.discard)
        return await answer

    async def settled(self) -> None:
        """Wait until all that was added is done, whoever still waits for it; raises nothing."""
        while self._doing:
            await asyncio.wait(self._doing)

    async def _after_a_moment(self) -> None:
        await asyncio.sleep(self.pause_s)
        items, self._items, self._soon = self._items, [], None
        try:
            answers = await self._do([item for item, _ in items])
        except BaseException as error:
            for _, waiting in items:
                if not waiting.done():
                    waiting.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        for (_, waiting), answer in zip(items, answers, strict=True):
            if not waiting.done():
                waiting.set_result(answer)
