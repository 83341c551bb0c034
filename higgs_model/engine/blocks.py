"""The pool of KV blocks: reference counts and prefix caching.

A block holds the keys and values of `block_size` positions. A full block whose content is registered under its hash
can be shared by several sequences; after its last release it stays cached until its memory is needed, least recently
used first. Block 0 is the null block: it is never allocated, and inactive rows of a batch write to it. Nothing here
touches a tensor.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BlockHash = bytes


def hash_blocks(content_PC: NDArray[np.int64], block_size: int) -> list[BlockHash]:
    """Return the hashes of the full blocks of a sequence; each covers all content up to the end of its block.

    Args:
        content_PC: one row per position, equal for two positions exactly if the network reads the same there.
    """
    hashes, block_hash = [], b""
    for start in range(0, len(content_PC) - block_size + 1, block_size):
        rows = np.ascontiguousarray(content_PC[start : start + block_size])
        block_hash = hashlib.blake2b(block_hash + rows.tobytes(), digest_size=16).digest()
        hashes.append(block_hash)
    return hashes


class BlockPool:
    """Blocks 1 … `num_blocks` − 1. Each is free, cached (registered but unreferenced), or in use."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = deque(range(1, num_blocks))
        self._cached: OrderedDict[int, BlockHash] = OrderedDict()
        self._ref_counts = [0] * num_blocks
        self._hash_of: dict[int, BlockHash] = {}
        self._block_of: dict[BlockHash, int] = {}

    @property
    def capacity(self) -> int:
        """Blocks that can be in use at the same time."""
        return self.num_blocks - 1

    @property
    def available(self) -> int:
        """Blocks that `allocate` could return: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks in use."""
        return self.capacity - self.available

    @property
    def shared(self) -> int:
        """Blocks that more than one sequence uses."""
        return sum(count > 1 for count in self._ref_counts)

    def find_cached(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Return the registered blocks of the longest prefix of `hashes`; `retain` must follow to keep them."""
        blocks = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def retain(self, blocks: Sequence[int]) -> None:
        """Increment the reference counts of blocks that `find_cached` returned."""
        for block in blocks:
            self._ref_counts[block] += 1
            self._cached.pop(block, None)

    def allocate(self, count: int) -> list[int] | None:
        """Allocate `count` blocks, evicting the least recently used cached ones; None if there are not enough."""
        if count > self.available:
            return None
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, block_hash = self._cached.popitem(last=False)
                del self._block_of[block_hash], self._hash_of[block]
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def register(self, block: int, block_hash: BlockHash) -> bool:
        """Register a full block that is in use for sharing; False if another block has the same content."""
        if block_hash in self._block_of:
            return False
        self._block_of[block_hash], self._hash_of[block] = block, block_hash
        return True

    def release(self, blocks: Sequence[int]) -> None:
        """Decrement reference counts. Later blocks are evicted first, because a prefix serves more sequences."""
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] > 0:
                continue
            block_hash = self._hash_of.get(block)
            if block_hash is None:
                self._free.append(block)
            else:
                self._cached[block] = block_hash

    def clear_prefix_cache(self) -> None:
        """Free all cached blocks."""
        for block, block_hash in self._cached.items():
            del self._block_of[block_hash], self._hash_of[block]
            self._free.append(block)
        self._cached.clear()
