"""Who runs, who waits, and which stretches of prompts are run next. Decides everything, touches no tensor.

First come, first served within a priority. A sequence is admitted when a slot and the blocks of its prompt are there,
and a block for each that runs already; blocks for speech are taken as it grows. When there are none left, the
sequence that would be served last loses its slot and waits again.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator

from higgs_model.engine.blocks import BlockPool
from higgs_model.engine.sequence import Phase, Sequence
from higgs_model.engine.spans import Span


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
        self.running: dict[int, Sequence] = {}

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    def in_phase(self, phase: Phase) -> list[Sequence]:
        """Running sequences, those that are served first first."""
        return sorted((one for one in self.running.values() if one.phase is phase), key=lambda one: one.order)

    def everyone(self) -> Iterator[Sequence]:
        """All sequences, with and without a slot."""
        yield from self._waiting
        yield from self.running.values()

    def wait(self, sequence: Sequence) -> None:
        """Queue up."""
        bisect.insort(self._waiting, sequence, key=lambda one: one.order)

    def admit(self) -> Iterator[tuple[Sequence, int]]:
        """Give slots and blocks to those who wait, in order; with each, how many of its blocks are shared ones."""
        while self._waiting and self._free_slots:
            sequence = self._waiting[0]
            # The last position is always run: who says text first needs the network's state there.
            shared = self.pool.find(sequence.keys[: (len(sequence.prompt) - 1) // self.pool.block_size])
            self.pool.hold(shared)
            needed = self._blocks_for(len(sequence.prompt) + 1) - len(shared)
            spare = len(self.running)
            own = self.pool.take(needed) if needed + spare <= self.pool.available else None
            if own is None:
                self.pool.release(shared)
                return
            del self._waiting[0]
            sequence.slot = self._free_slots.pop(0)
            sequence.blocks, sequence.phase = shared + own, Phase.PROMPT
            sequence.computed = len(shared) * self.pool.block_size
            self.counters.shared_positions += sequence.computed
            self.running[sequence.slot] = sequence
            yield sequence, len(shared)

    def plan_prefill(self) -> list[tuple[Sequence, Span]]:
        """Stretches of prompts to run together. Each ends with its prompt or at the end of a block."""
        speaking = any(one.phase is Phase.SPEECH for one in self.running.values())
        budget = self._prefill_positions if speaking else self._idle_prefill_positions
        planned: list[tuple[Sequence, Span]] = []
        for sequence in self.in_phase(Phase.PROMPT):
            start = sequence.computed
            stop = self._stop(sequence, budget)
            if stop <= start:
                # Whoever is first gets on, however small the budget.
                if planned:
                    break
                stop = self._stop(sequence, self.pool.block_size)
            planned.append((sequence, Span(sequence.slot, start, stop)))
            budget -= stop - start
        return planned

    def _stop(self, sequence: Sequence, budget: int) -> int:
        """Where a stretch of at most about `budget` positions ends. Text that was said is run as it was, one by one."""
        start, length = sequence.computed, sequence.prompt_length
        if start >= length:
            return start + 1 if budget > 0 else start
        size = self.pool.block_size
        return length if length - start <= budget else (start + budget) // size * size

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
