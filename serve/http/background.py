"""Runs blocking work in a thread, and short work directly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Result = TypeVar("Result")

_SHORT_CHARS = 2000


def is_short(row: Mapping[str, Any]) -> bool:
    """Return whether validating and planning a row takes only about a millisecond.

    Switching threads costs half of that, and far more while the engine keeps the interpreter busy.
    """
    simple = "turns" not in row and not row.get("spoken_forms") and row.get("chunk_method") != "word"
    return simple and len(str(row.get("text", ""))) <= _SHORT_CHARS


async def run_in_thread(function: Callable[..., Result], *arguments: object, inline: bool) -> Result:
    """Return `function(*arguments)`, run in a thread unless `inline`, which is for short work."""
    return function(*arguments) if inline else await asyncio.to_thread(function, *arguments)
