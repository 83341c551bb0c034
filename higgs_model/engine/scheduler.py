"""Who runs, who waits, and which stretches of prompts are run next. Decides everything, touches no tensor.

First come, first served within a priority; but every `_OLDEST_EVERY`th slot goes to whoever has waited longest, who
from then on comes first: so nobody waits for ever, however many requests of a higher priority keep coming. Who is next
is waited for, however much room it needs: a long prompt is not overtaken by short ones.

A sequence is admitted when a slot and the blocks of its prompt are there, and a block for each that runs already;
blocks for speech are taken as it grows. When there are none left, the sequence that would be served last loses its
slot and waits again. Prompts are run in bounded stretches between frames; while many speak, a few prompts wait some
steps for more to come, since a pass over one takes almost as long as one over several. A block that several prompts
begin with is computed by one of them, and the others wait for it.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator

from higgs_model.engine.blocks import BlockPool, Key
from higgs_model.engine.sequence import Phase, Sequence
from higgs_model.engine.spans import Span

_OLDEST_EVERY = 8
"""Slots given by priority and arrival before one is given by arrival alone."""
_WORTH_A_PASS = 32
"""A prompt for so many that speak is enough for a pass at once."""
_LONGEST_HOLD_STEPS = 8
"""Steps that prompts wait for others at most."""


@dataclasses.dataclass
class Counters:
    """What the scheduler has done since the start."""

    preemptions: int = 0
    shared_positions: int = 0


class Scheduler:
    """Slots 0 … `max_slots` − 1 and a pool of blocks.

    Args:
        prefill_positions: of prompts that may be run between two frames, while somebody speaks.
        idle_prefill_positions: the same while nobody does.
    """

    def __init__(self, pool: BlockPool, *, max_slots: int, prefill_positions: int, idle_prefill_positions: int) -> None:
        self.pool, self.counters = pool, Counters()
        self._prefill_positions, self._idle_prefill_positions = prefill_positions, idle_prefill_positions
        self._free_slots = list(range(max_slots))
        self._waiting: list[Sequence] = []
        self._admissions = self._held_steps = 0
        self.running: dict[int, Sequence] = {}

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    def in_phase(self, phase: Phase) -> list[Sequence]:
        """Running sequences, in no particular order."""
        return [one for one in self.running.values() if one.phase is phase]

    def wait(self, sequence: Sequence) -> None:
        """Queue up."""
        bisect.insort(self._waiting, sequence, key=lambda one: one.order)

    def admit(self) -> Iterator[tuple[Sequence, range]]:
        """Give slots and blocks to those who wait; with each, which of its blocks have their content already."""
        while self._waiting and self._free_slots:
            sequence = self._next()
            shared = self.pool.find(sequence.keys[: self._sharable(sequence)])
            self.pool.hold(shared)
            needed = self._blocks_for(len(sequence.prompt) + 1) - len(shared)
            spare = len(self.running)
            own = self.pool.take(needed) if needed + spare <= self.pool.available else None
            if own is None:
                self.pool.release(shared)
                return
            del self._waiting[0]
            self._admissions += 1
            sequence.slot = self._free_slots.pop(0)
            sequence.blocks, sequence.phase = shared + own, Phase.PROMPT
            self._skip(sequence, len(shared))
            self.running[sequence.slot] = sequence
            yield sequence, range(len(shared))

    def _next(self) -> Sequence:
        """The first of those who wait; now and then the one that came first of all is made it."""
        if self._admissions % _OLDEST_EVERY == _OLDEST_EVERY - 1:
            oldest = min(self._waiting, key=lambda one: one.arrival)
            self._waiting.remove(oldest)
            oldest.comes_first = True
            self.wait(oldest)
        return self._waiting[0]

    def adopt(self) -> Iterator[tuple[Sequence, range]]:
        """Give prompts under way the blocks that others have computed meanwhile; with each, which of its blocks."""
        for sequence in self.in_phase(Phase.PROMPT):
            done, sharable = sequence.computed // self.pool.block_size, self._sharable(sequence)
            found = self.pool.find(sequence.keys[done:sharable])
            if found:
                self.pool.hold(found)
                taken = slice(done, done + len(found))
                self.pool.release(sequence.blocks[taken])
                sequence.blocks[taken] = found
                self._skip(sequence, len(found))
                yield sequence, range(done, done + len(found))

    def _sharable(self, sequence: Sequence) -> int:
        """Blocks that may be taken from others. The last position is always run: its hidden state is needed."""
        return min(len(sequence.keys), (len(sequence.prompt) - 1) // self.pool.block_size)

    def _skip(self, sequence: Sequence, blocks: int) -> None:
        sequence.computed += blocks * self.pool.block_size
        self.counters.shared_positions += blocks * self.pool.block_size

    def plan_prefill(self) -> list[tuple[Sequence, Span]]:
        """Stretches of prompts to run together. Each ends with its prompt or at the end of a block."""
        prompts = sorted(self.in_phase(Phase.PROMPT), key=lambda one: one.order)
        speaking = len(self.in_phase(Phase.SPEECH))
        if self._better_later(len(prompts), speaking):
            return []
        budget = self._prefill_positions if speaking else self._idle_prefill_positions
        planned: list[tuple[Sequence, Span]] = []
        under_way: set[Key] = set()
        for sequence in prompts:
            first, start = sequence.computed // self.pool.block_size, sequence.computed
            if first < self._sharable(sequence) and sequence.keys[first] in under_way:
                continue
            stop = self._stop(sequence, budget)
            if stop <= start:
                # Whoever is first gets on, however small the budget.
                if planned:
                    break
                stop = self._stop(sequence, self.pool.block_size)
            planned.append((sequence, Span(sequence.slot, start, stop)))
            under_way.update(sequence.keys[first : stop // self.pool.block_size])
            budget -= stop - start
        return planned

    def _better_later(self, prompts: int, speaking: int) -> bool:
        few = 0 < prompts * _WORTH_A_PASS < speaking
        self._held_steps = self._held_steps + 1 if few and self._held_steps < _LONGEST_HOLD_STEPS else 0
        return self._held_steps > 0

    def _stop(self, sequence: Sequence, budget: int) -> int:
        """Where a stretch of at most about `budget` positions ends. Text that was said is run as it was, one by one."""
        start, length = sequence.computed, sequence.prompt_length
        if start >= length:
            return start + 1 if budget > 0 else start
        size = self.pool.block_size
        return length if length - start <= budget else (start + budget) // size * size

    def short_of_blocks(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Those whose next step needs another block, those that come first first."""
        size = self.pool.block_size
        short = [one for one in sequences if one.length > len(one.blocks) * size]
        return sorted(short, key=lambda one: one.order)

    def grow(self, sequence: Sequence) -> tuple[bool, list[int]]:
        """Take the blocks that a sequence's next step needs.

        Returns:
            Whether blocks were taken, and the slots that were lost for it, perhaps the sequence's own.
        """
        lost: list[int] = []
        missing = self._blocks_for(sequence.length) - len(sequence.blocks)
        while missing > 0:
            blocks = self.pool.take(missing)
            if blocks is not None:
                sequence.blocks += blocks
                return True, lost
            victim = max(self.running.values(), key=lambda one: one.order)
            lost.append(victim.slot)
            self.preempt(victim)
            if victim is sequence:
                break
        return False, lost

    def preempt(self, sequence: Sequence) -> None:
        """Take a sequence's slot and blocks away; it waits again."""
        self._vacate(sequence)
        sequence.lose_slot()
        self.wait(sequence)
        self.counters.preemptions += 1

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        elif sequence.slot in self.running:
            self._vacate(sequence)
        sequence.phase = Phase.ENDED

    def _vacate(self, sequence: Sequence) -> None:
        del self.running[sequence.slot]
        bisect.insort(self._free_slots, sequence.slot)
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def _blocks_for(self, positions: int) -> int:
        return -(-positions // self.pool.block_size)


def highest_slot(sequences: Iterable[Sequence]) -> int:
    """The highest slot in use; −1 for none."""
    return max((one.slot for one in sequences), default=-1)
