"""The block pool never loses a block, shares only registered ones, and finds cached ones by content."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from higgs_model.engine.blocks import BlockPool, hash_blocks

SIZE = 4


def test_block_hash_covers_all_content_up_to_its_block():
    content = np.arange(40).reshape(20, 2)
    hashes = hash_blocks(content, SIZE)
    assert len(hashes) == 5
    assert len(hash_blocks(content[:19], SIZE)) == 4
    assert hash_blocks(content[:19], SIZE) == hashes[:4]
    changed = content.copy()
    changed[5, 1] += 1
    assert [a == b for a, b in zip(hash_blocks(changed, SIZE), hashes, strict=True)] == [True] + [False] * 4


class PoolMachine(RuleBasedStateMachine):
    """Sequences of random content are allocated and released in any order."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(9, SIZE)
        self.sequences = []
        self.content = {}

    @rule(branch=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def add_sequence(self, branch):
        hashes = hash_blocks(np.repeat(branch, SIZE)[:, None], SIZE)
        shared = self.pool.find_cached(hashes)
        assert [self.content[block] for block in shared] == hashes[: len(shared)]
        self.pool.retain(shared)
        available = self.pool.available
        own = self.pool.allocate(len(hashes) - len(shared))
        if own is None:
            assert len(hashes) - len(shared) > available
            self.pool.release(shared)
            return
        blocks = shared + own
        for block, block_hash in zip(own, hashes[len(shared) :], strict=True):
            self.content[block] = block_hash
            self.pool.register(block, block_hash)
        self.sequences.append(blocks)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def remove_sequence(self, data):
        self.pool.release(self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1))))

    @rule()
    def clear_prefix_cache(self):
        self.pool.clear_prefix_cache()

    @invariant()
    def every_block_is_in_use_or_available(self):
        in_use = {block for blocks in self.sequences for block in blocks}
        assert 0 not in in_use
        assert self.pool.used == len(in_use)
        assert self.pool.available == self.pool.capacity - len(in_use)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
