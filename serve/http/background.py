"""Runs blocking functions in a thread, and cheap ones inline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Result = TypeVar("Result")

_SHORT_CHARS = 2000


def is_cheap_to_plan(row: Mapping[str, Any]) -> bool:
    """Return whether validating and planning a row takes at most about a millisecond.

    Switching threads costs half a millisecond, and far more while the engine keeps the interpreter busy.
    """
    is_simple = "turns" not in row and not row.get("spoken_forms") and row.get("chunk_method") != "word"
    return is_simple and len(str(row.get("text", ""))) <= _SHORT_CHARS


async def run_in_thread(function: Callable[..., Result], *arguments: object, inline: bool) -> Result:
    """Run `function(*arguments)` in a thread, or on the event loop if `inline`, and return its result."""
    return function(*arguments) if inline else await asyncio.to_thread(function, *arguments)
