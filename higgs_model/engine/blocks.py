"""The pool of KV blocks: who holds which, and which hold what is worth keeping.

A block has room for `block_size` positions. A full one whose content is known by key can be held by several
sequences at once; when nobody holds it, it stays until its room is needed, the least recently used one going first.
Block 0 is never given out: rows of a batch that do not count write there. Nothing here touches a tensor.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Key = bytes


def content_keys(content_PC: NDArray[np.int64], block_size: int) -> list[Key]:
    """Keys of the full blocks of a sequence; each stands for all content up to its block's end.

    Args:
        content_PC: one row a position, equal for two positions exactly if the network is given the same there.
    """
    keys, key = [], b""
    for start in range(0, len(content_PC) - block_size + 1, block_size):
        rows = np.ascontiguousarray(content_PC[start : start + block_size])
        key = hashlib.blake2b(key + rows.tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys


class BlockPool:
    """Blocks 1 … `num_blocks` − 1 of a pool. Each is free, kept (known by key, held by nobody), or held."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = deque(range(1, num_blocks))
        self._kept: OrderedDict[int, Key] = OrderedDict()
        self._holders = [0] * num_blocks
        self._key_of: dict[int, Key] = {}
        self._block_of: dict[Key, int] = {}

    @property
    def capacity(self) -> int:
        """Blocks that can be held at all."""
        return self.num_blocks - 1

    @property
    def available(self) -> int:
        """Blocks that `take` could give."""
        return len(self._free) + len(self._kept)

    @property
    def used(self) -> int:
        """Blocks that are held."""
        return self.capacity - self.available

    @property
    def shared(self) -> int:
        """Blocks that more than one sequence holds."""
        return sum(holders > 1 for holders in self._holders)

    def find(self, keys: Sequence[Key]) -> list[int]:
        """Blocks with the longest known start of `keys`, not yet held."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def hold(self, blocks: Sequence[int]) -> None:
        """Hold blocks that were found, once more."""
        for block in blocks:
            self._holders[block] += 1
            self._kept.pop(block, None)

    def take(self, count: int) -> list[int] | None:
        """Hold `count` blocks without content, forgetting what was kept longest; None when there are not so many."""
        if count > self.available:
            return None
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, key = self._kept.popitem(last=False)
                del self._block_of[key], self._key_of[block]
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def know(self, block: int, key: Key) -> bool:
        """A held block is full and its content final; False when another block is already known for it."""
        if key in self._block_of:
            return False
        self._block_of[key], self._key_of[block] = block, key
        return True

    def release(self, blocks: Sequence[int]) -> None:
        """Hold blocks once less. Later ones go first when room is needed: a start serves more sequences."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] > 0:
                continue
            key = self._key_of.get(block)
            if key is None:
                self._free.append(block)
            else:
                self._kept[block] = key

    def forget(self) -> None:
        """Free all that is kept for nobody."""
        for block, key in self._kept.items():
            del self._block_of[key], self._key_of[block]
            self._free.append(block)
        self._kept.clear()
