"""What is learnt when: samples drawn anew for each epoch, and put together into batches of like length.

Everything follows from a seed and a number: the epoch's order, who gets which reference, which turns follow each other.
So a training that is gone on with needs to know only how many batches it has had. Nothing here touches a tensor.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from higgs_model.errors import BadInput
from higgs_model.model.merge import TRAINING_ROUND_TO
from higgs_model.training.collator import Example, Sizes
from higgs_model.training.prepare import Needs
from higgs_model.training.samples import Tokens
from higgs_model.training.settings import Batch as BatchSettings
from higgs_model.training.settings import Data
from higgs_model.training.store import PreparedSample, Shard

_POOL_BATCHES = 64
"""Within so many batches samples are sorted by length."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One sample of an epoch: rows whose turns follow each other, and the row that is heard before them (−1: none)."""

    rows: tuple[int, ...]
    reference: int
    num_positions: int


class Samples:
    """All prepared samples, by number.

    Args:
        folder: the shards of one manifest.

    Attributes:
        name: follows from all that the samples follow from.
        lengths: (rows, 3) positions of head, turn, and reference, which is 0 where there is none.
        faults: rows that are not among them, and why.
    """

    def __init__(self, folder: Path, needs: Needs, sizes: Sizes, longest: int) -> None:
        self.name = folder.name
        self._shards = [Shard(path) for path in sorted(folder.glob("rows-*.safetensors"))]
        self.faults = [fault for shard in self._shards for fault in shard.faults]
        self._places: list[tuple[int, int]] = []
        self._speakers: list[str | None] = []
        lengths = [np.empty((0, 3), np.int64)]
        for number, shard in enumerate(self._shards):
            found = shard.lengths(needs.placeholders, sizes.heard, lambda num_frames, _: sizes.out(num_frames))
            whole = found[:, 0] + found[:, 1]
            for row in np.flatnonzero(whole > longest).tolist():
                self.faults.append(f"{shard[row].id}: it takes {whole[row]} positions, and batch.longest is {longest}")
            kept = np.flatnonzero(whole <= longest)
            self._places += [(number, row) for row in kept.tolist()]
            self._speakers += [shard.speakers[row] for row in kept.tolist()]
            lengths.append(found[kept])
        self.lengths = np.concatenate(lengths)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> PreparedSample:
        shard, place = self._places[row]
        return self._shards[shard][place]

    @functools.cached_property
    def by_speaker(self) -> dict[str, NDArray[np.int64]]:
        """The rows of each speaker whose recordings can be shown as references."""
        found: dict[str, list[int]] = {}
        for row, speaker in enumerate(self._speakers):
            if speaker is not None and self.lengths[row, 2]:
                found.setdefault(speaker, []).append(row)
        return {speaker: np.array(rows) for speaker, rows in found.items()}

    def speaker(self, row: int) -> str | None:
        """Who speaks, if others of the same speaker can stand beside the row."""
        return self._speakers[row] if self.lengths[row, 2] else None

    def example(self, drawn: Drawn) -> Example:
        """The sequence that was drawn."""
        parts: list[tuple[Tokens, PreparedSample]] = []
        if drawn.reference >= 0:
            shown = self[drawn.reference]
            if shown.reference is not None:
                parts.append((shown.reference, shown))
        for at, row in enumerate(drawn.rows):
            sample = self[row]
            parts += [(sample.head, sample)] if at == 0 and drawn.reference < 0 else []
            parts.append((sample.turn, sample))
        return Example(
            np.concatenate([tokens.ids for tokens, _ in parts]),
            np.concatenate([tokens.trained for tokens, _ in parts]),
            tuple(sample.recordings[clip] for tokens, sample in parts for clip in tokens.clips),
        )


class Batches:
    """An endless, numbered sequence of batches: each epoch's samples once, then the next epoch's.

    Args:
        shuffle: False keeps the order of the manifest, and draws nothing: for validation.
    """

    def __init__(self, samples: Samples, data: Data, batch: BatchSettings, seed: int, *, shuffle: bool = True) -> None:
        if not len(samples):
            raise BadInput(f"the manifest {data.manifest!r} has no sample that can be learnt from")
        self._samples, self._data, self._batch = samples, data, batch
        self._seed, self._shuffle = seed, shuffle

    def after(self, done: int) -> Iterator[tuple[int, list[list[Drawn]]]]:
        """Batches from number `done` on, each with its epoch: rows of one sample, or of several packed."""
        epoch = 0
        while True:
            planned = self.epoch(epoch)
            if done < len(planned):
                yield from ((epoch, rows) for rows in planned[done:])
            done = max(done - len(planned), 0)
            epoch += 1

    def epoch(self, epoch: int) -> list[list[list[Drawn]]]:
        """All batches of an epoch."""
        if not self._shuffle:
            lengths = self._samples.lengths
            drawn = [Drawn((row,), -1, int(lengths[row, :2].sum())) for row in range(len(self._samples))]
            return self._cut(sorted(drawn, key=lambda one: one.num_positions))
        random = np.random.default_rng([self._seed, epoch])
        drawn = self._draw(random)
        average = sum(one.num_positions for one in drawn) / len(drawn)
        pool = max(int(_POOL_BATCHES * self._batch.positions / average), 1)
        batches: list[list[list[Drawn]]] = []
        for start in range(0, len(drawn), pool):
            batches += self._cut(sorted(drawn[start : start + pool], key=lambda one: one.num_positions))
        return [batches[at] for at in random.permutation(len(batches))]

    # ------------------------------------------------------------------ drawing

    def _draw(self, random: np.random.Generator) -> list[Drawn]:
        """Each row once, in random order; rows of a speaker may follow each other."""
        samples, longest = self._samples, self._batch.longest
        drawn: list[Drawn] = []
        waiting: dict[str, tuple[list[int], int, int, int]] = {}
        for row in random.permutation(len(samples)).tolist():
            speaker = samples.speaker(row)
            turn = int(samples.lengths[row, 1])
            if speaker is None:
                drawn.append(Drawn((row,), -1, int(samples.lengths[row, :2].sum())))
                continue
            rows, reference, length, wanted = waiting.pop(speaker, ([], -1, 0, 0))
            # What is shown as reference must not be asked for afterwards.
            if rows and (length + turn > longest or row == reference):
                drawn.append(Drawn(tuple(rows), reference, length))
                rows = []
            if not rows:
                reference, length = self._opening(random, row, speaker)
                wanted = int(random.integers(1, self._data.turns + 1))
                rows = []
            rows.append(row)
            length += turn
            if len(rows) < wanted:
                waiting[speaker] = (rows, reference, length, wanted)
            else:
                drawn.append(Drawn(tuple(rows), reference, length))
        drawn += [Drawn(tuple(rows), reference, length) for rows, reference, length, _ in waiting.values()]
        return [drawn[at] for at in random.permutation(len(drawn))]

    def _opening(self, random: np.random.Generator, row: int, speaker: str) -> tuple[int, int]:
        """What stands before a first turn, the row of a reference or −1, and how long it is."""
        lengths = self._samples.lengths
        others = self._samples.by_speaker[speaker]
        if random.random() < self._data.reference and len(others) > 1:
            reference = int(random.choice(others[others != row]))
            if lengths[reference, 2] + lengths[row, 1] <= self._batch.longest:
                return reference, int(lengths[reference, 2])
        return -1, int(lengths[row, 0])

    # ------------------------------------------------------------------ batching

    def _cut(self, drawn: Sequence[Drawn]) -> list[list[list[Drawn]]]:
        """Samples, sorted by length, as batches."""
        rows = self._packed(drawn) if self._batch.pack else [[one] for one in drawn]
        batches: list[list[list[Drawn]]] = []
        longest = 0
        for row in rows:
            length = _rounded(sum(one.num_positions for one in row))
            if batches and (len(batches[-1]) + 1) * max(longest, length) <= self._batch.positions:
                batches[-1].append(row)
                longest = max(longest, length)
            else:
                batches.append([row])
                longest = length
        return batches

    def _packed(self, drawn: Sequence[Drawn]) -> list[list[Drawn]]:
        """First fit, the longest first: rows of at most `longest` positions."""
        rows: list[list[Drawn]] = []
        room: list[int] = []
        open_from = 0
        for one in reversed(drawn):
            at = next((at for at in range(open_from, len(rows)) if room[at] >= one.num_positions), len(rows))
            if at == len(rows):
                rows.append([])
                room.append(self._batch.longest)
            rows[at].append(one)
            room[at] -= one.num_positions
            while open_from < len(rows) and room[open_from] < drawn[0].num_positions:
                open_from += 1
        return rows


def _rounded(length: int) -> int:
    return -(-length // TRAINING_ROUND_TO) * TRAINING_ROUND_TO
