"""Decides which requests run, which wait, and which spans of prompts are prefilled next. Touches no tensor.

Requests are served in order of arrival within a priority. Every `_OLDEST_INTERVAL`th slot goes to the request that has
waited longest, which from then on comes first, so that none starves however many requests of a higher priority arrive.
The next request in line is never overtaken: a long prompt waits for its blocks, and short ones behind it wait as well.

A sequence is admitted when there are a slot, blocks for its prompt, and one spare block for each running sequence;
blocks for its frames are allocated as it grows. When blocks run out, the sequence that comes last is preempted. Prompts
are prefilled in bounded spans between decode steps. While many sequences decode, a few prompts wait some steps for
others to join, because a pass over one takes almost as long as one over several. A block that several prompts share is
computed by one of them while the others wait.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator

from higgs_model.engine.blocks import BlockHash, BlockPool
from higgs_model.engine.prefill_span import PrefillSpan
from higgs_model.engine.sequence import Phase, Sequence

_OLDEST_INTERVAL = 8
"""Every n-th free slot goes to the request that has waited longest, whatever its priority."""
_DECODES_PER_PREFILL = 32
"""Prefill is deferred while there is less than one waiting prompt per this many decoding sequences."""
_MAX_DEFERRED_STEPS = 8
"""Steps for which prefill may be deferred."""


@dataclasses.dataclass
class Counters:
    """Totals since the start."""

    preemptions: int = 0
    shared_positions: int = 0


class Scheduler:
    """Schedules sequences onto slots 0 … `max_slots` − 1 and a pool of blocks.

    Args:
        prefill_positions: positions that may be prefilled between two decode steps.
        idle_prefill_positions: the same while nothing decodes.
    """

    def __init__(self, pool: BlockPool, *, max_slots: int, prefill_positions: int, idle_prefill_positions: int) -> None:
        self.pool, self.counters = pool, Counters()
        self._prefill_positions, self._idle_prefill_positions = prefill_positions, idle_prefill_positions
        self._free_slots = list(range(max_slots))
        self._waiting: list[Sequence] = []
        self._num_admitted = self._deferred_steps = 0
        self.running: dict[int, Sequence] = {}

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    def in_phase(self, phase: Phase) -> list[Sequence]:
        """Return the running sequences in a phase, in no particular order."""
        return [sequence for sequence in self.running.values() if sequence.phase is phase]

    def enqueue(self, sequence: Sequence) -> None:
        """Add a sequence to the waiting ones."""
        bisect.insort(self._waiting, sequence, key=lambda waiting: waiting.order)

    def admit(self) -> Iterator[tuple[Sequence, range]]:
        """Admit waiting sequences; yield each with the indices of its blocks that are already computed."""
        while self._waiting and self._free_slots:
            sequence = self._next_waiting()
            shared = self.pool.find_cached(sequence.block_hashes[: self._num_shareable(sequence)])
            self.pool.retain(shared)
            needed = self._blocks_for(len(sequence.prompt) + 1) - len(shared)
            spare = len(self.running)
            own = self.pool.allocate(needed) if needed + spare <= self.pool.available else None
            if own is None:
                self.pool.release(shared)
                return
            del self._waiting[0]
            self._num_admitted += 1
            sequence.slot = self._free_slots.pop(0)
            sequence.blocks, sequence.phase = shared + own, Phase.PREFILL
            self._skip_computed(sequence, len(shared))
            self.running[sequence.slot] = sequence
            yield sequence, range(len(shared))

    def _next_waiting(self) -> Sequence:
        """Return the first waiting sequence, after promoting the oldest one when it is due."""
        if self._num_admitted % _OLDEST_INTERVAL == _OLDEST_INTERVAL - 1:
            oldest = min(self._waiting, key=lambda waiting: waiting.arrival)
            self._waiting.remove(oldest)
            oldest.promoted = True
            self.enqueue(oldest)
        return self._waiting[0]

    def reuse_computed_blocks(self) -> Iterator[tuple[Sequence, range]]:
        """Replace blocks of prompts in prefill by blocks that other sequences have computed in the meantime.

        Yields each sequence with the range of its replaced blocks.
        """
        for sequence in self.in_phase(Phase.PREFILL):
            start, stop = sequence.num_computed // self.pool.block_size, self._num_shareable(sequence)
            found = self.pool.find_cached(sequence.block_hashes[start:stop])
            if found:
                self.pool.retain(found)
                replaced = slice(start, start + len(found))
                self.pool.release(sequence.blocks[replaced])
                sequence.blocks[replaced] = found
                self._skip_computed(sequence, len(found))
                yield sequence, range(start, start + len(found))

    def _num_shareable(self, sequence: Sequence) -> int:
        """Blocks that may be reused. The last position is always computed, because its hidden state is needed."""
        return min(len(sequence.block_hashes), (len(sequence.prompt) - 1) // self.pool.block_size)

    def _skip_computed(self, sequence: Sequence, blocks: int) -> None:
        sequence.num_computed += blocks * self.pool.block_size
        self.counters.shared_positions += blocks * self.pool.block_size

    def plan_prefill(self) -> list[tuple[Sequence, PrefillSpan]]:
        """Choose the spans of the next prefill pass. Each ends with its prompt or at a block boundary."""
        prompts = sorted(self.in_phase(Phase.PREFILL), key=lambda sequence: sequence.order)
        decoding = len(self.in_phase(Phase.DECODE))
        if self._should_defer_prefill(len(prompts), decoding):
            return []
        budget = self._prefill_positions if decoding else self._idle_prefill_positions
        planned: list[tuple[Sequence, PrefillSpan]] = []
        in_progress: set[BlockHash] = set()
        for sequence in prompts:
            first, start = sequence.num_computed // self.pool.block_size, sequence.num_computed
            if first < self._num_shareable(sequence) and sequence.block_hashes[first] in in_progress:
                continue
            stop = self._span_stop(sequence, budget)
            if stop <= start:
                # The first prompt makes progress however small the budget is.
                if planned:
                    break
                stop = self._span_stop(sequence, self.pool.block_size)
            planned.append((sequence, PrefillSpan(sequence.slot, start, stop)))
            in_progress.update(sequence.block_hashes[first : stop // self.pool.block_size])
            budget -= stop - start
        return planned

    def _should_defer_prefill(self, prompts: int, decoding: int) -> bool:
        few = 0 < prompts * _DECODES_PER_PREFILL < decoding
        self._deferred_steps = self._deferred_steps + 1 if few and self._deferred_steps < _MAX_DEFERRED_STEPS else 0
        return self._deferred_steps > 0

    def _span_stop(self, sequence: Sequence, budget: int) -> int:
        """Return where a span of about `budget` positions ends.

        Generated text is recomputed token by token, as before.
        """
        start, length = sequence.num_computed, sequence.prompt_length
        if start >= length:
            return start + 1 if budget > 0 else start
        size = self.pool.block_size
        return length if length - start <= budget else (start + budget) // size * size

    def needing_blocks(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Return the sequences whose next step needs another block, in scheduling order."""
        size = self.pool.block_size
        needing = [sequence for sequence in sequences if sequence.length > len(sequence.blocks) * size]
        return sorted(needing, key=lambda sequence: sequence.order)

    def allocate_blocks(self, sequence: Sequence) -> tuple[bool, list[int]]:
        """Allocate the blocks of a sequence's next step, preempting others, or the sequence itself, if necessary.

        Returns:
            Whether blocks were allocated, and the slots that were preempted.
        """
        preempted: list[int] = []
        missing = self._blocks_for(sequence.length) - len(sequence.blocks)
        while missing > 0:
            blocks = self.pool.allocate(missing)
            if blocks is not None:
                sequence.blocks += blocks
                return True, preempted
            victim = max(self.running.values(), key=lambda running: running.order)
            preempted.append(victim.slot)
            self.preempt(victim)
            if victim is sequence:
                break
        return False, preempted

    def preempt(self, sequence: Sequence) -> None:
        """Release a sequence's slot and blocks and return it to the waiting queue."""
        self._release(sequence)
        sequence.preempt()
        self.enqueue(sequence)
        self.counters.preemptions += 1

    def remove(self, sequence: Sequence) -> None:
        """Remove a finished sequence."""
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        elif sequence.slot in self.running:
            self._release(sequence)
        sequence.phase = Phase.FINISHED

    def _release(self, sequence: Sequence) -> None:
        del self.running[sequence.slot]
        bisect.insort(self._free_slots, sequence.slot)
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def _blocks_for(self, positions: int) -> int:
        return -(-positions // self.pool.block_size)


def highest_slot(sequences: Iterable[Sequence]) -> int:
    """Return the highest slot in use; −1 for none."""
    return max((sequence.slot for sequence in sequences), default=-1)
