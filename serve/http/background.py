"""Work that would hold the event loop up, in a thread; work that is soon done, at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Result = TypeVar("Result")

_SHORT_CHARS = 2000


def is_short(row: Mapping[str, Any]) -> bool:
    """Whether a manifest's row is read and planned in a millisecond or so. To change threads for it costs half of that,
    and far more while the engine keeps the interpreter busy."""
    plain = "turns" not in row and not row.get("spoken_forms") and row.get("chunk_method") != "word"
    return plain and len(str(row.get("text", ""))) <= _SHORT_CHARS


async def aside(act: Callable[..., Result], *arguments: object, at_once: bool) -> Result:
    """`act(*arguments)`: in a thread, unless it is known to be short."""
    return act(*arguments) if at_once else await asyncio.to_thread(act, *arguments)
