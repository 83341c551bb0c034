"""The block pool loses no block, shares only registered ones, and finds cached ones by content."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from higgs_model.engine.blocks import BlockPool, hash_blocks

SIZE = 4


def test_block_hash_covers_all_content_up_to_its_block():
    content = np.arange(40).reshape(20, 2)
    keys = hash_blocks(content, SIZE)
    assert len(keys) == 5
    assert len(hash_blocks(content[:19], SIZE)) == 4
    assert hash_blocks(content[:19], SIZE) == keys[:4]
    changed = content.copy()
    changed[5, 1] += 1
    assert [a == b for a, b in zip(hash_blocks(changed, SIZE), keys, strict=True)] == [True] + [False] * 4


class Pool(RuleBasedStateMachine):
    """Sequences of random content are allocated and released in any order."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(9, SIZE)
        self.held = []
        self.content = {}

    @rule(branch=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def begin(self, branch):
        keys = hash_blocks(np.repeat(branch, SIZE)[:, None], SIZE)
        shared = self.pool.find_cached(keys)
        assert [self.content[block] for block in shared] == keys[: len(shared)]
        self.pool.retain(shared)
        before = self.pool.available
        own = self.pool.allocate(len(keys) - len(shared))
        if own is None:
            assert len(keys) - len(shared) > before
            self.pool.release(shared)
            return
        blocks = shared + own
        for block, key in zip(own, keys[len(shared) :], strict=True):
            self.content[block] = key
            self.pool.register(block, key)
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data):
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule()
    def forget(self):
        self.pool.clear_prefix_cache()

    @invariant()
    def nothing_is_lost(self):
        in_hand = {block for blocks in self.held for block in blocks}
        assert 0 not in in_hand
        assert self.pool.used == len(in_hand)
        assert self.pool.available == self.pool.capacity - len(in_hand)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
