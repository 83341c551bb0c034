"""Sampling of training sequences for each epoch, and batching of sequences of similar length.

Order, references and consecutive turns of an epoch follow from the seed and the number of the epoch alone, so a resumed
run only needs the number of batches it has consumed. No tensors here.
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
from higgs_model.training.collator import Example, PositionCounter
from higgs_model.training.prepare import AudioRequirements
from higgs_model.training.samples import TokenSpan
from higgs_model.training.settings import BatchSettings, DataSettings
from higgs_model.training.store import PreparedSample, Shard

_POOL_BATCHES = 64
"""Size of the pool, in batches, within which sequences are sorted by length."""


@dataclasses.dataclass(frozen=True)
class SequenceSpec:
    """One training sequence.

    Attributes:
        rows: rows with the consecutive turns of the sequence.
        reference: row with the reference recording before them; −1: none.
        num_positions: length of the sequence in expanded positions.
    """

    rows: tuple[int, ...]
    reference: int
    num_positions: int


class PreparedDataset:
    """All prepared samples of a manifest, by index.

    Args:
        folder: folder with the manifest's shards.
        requirements: the network's audio requirements.
        counter: the network's position counts.
        longest: maximum positions per sample; longer ones are excluded and reported.

    Attributes:
        name: name of the folder, which identifies the data.
        lengths: (rows, 3) positions of prefix, turn and reference; 0 for no reference.
        row_errors: messages about excluded rows.
    """

    def __init__(self, folder: Path, requirements: AudioRequirements, counter: PositionCounter, longest: int) -> None:
        self.name = folder.name
        self._shards = [Shard(path) for path in sorted(folder.glob("rows-*.safetensors"))]
        self.row_errors = [error for shard in self._shards for error in shard.row_errors]
        self._locations: list[tuple[int, int]] = []
        self._speakers: list[str | None] = []
        lengths = [np.empty((0, 3), np.int64)]
        for index, shard in enumerate(self._shards):
            shard_lengths = shard.lengths(
                requirements.placeholders,
                counter.input_positions,
                lambda num_frames, _: counter.output_positions(num_frames),
            )
            totals = shard_lengths[:, 0] + shard_lengths[:, 1]
            for row in np.flatnonzero(totals > longest).tolist():
                self.row_errors.append(f"{shard[row].id}: {totals[row]} positions exceed batch.longest={longest}")
            valid = np.flatnonzero(totals <= longest)
            self._locations += [(index, row) for row in valid.tolist()]
            self._speakers += [shard.speakers[row] for row in valid.tolist()]
            lengths.append(shard_lengths[valid])
        self.lengths = np.concatenate(lengths)

    def __len__(self) -> int:
        return len(self._locations)

    def __getitem__(self, row: int) -> PreparedSample:
        shard, shard_row = self._locations[row]
        return self._shards[shard][shard_row]

    @functools.cached_property
    def by_speaker(self) -> dict[str, NDArray[np.int64]]:
        """Rows of each speaker that can serve as references."""
        rows_by_speaker: dict[str, list[int]] = {}
        for row, speaker in enumerate(self._speakers):
            if speaker is not None and self.lengths[row, 2]:
                rows_by_speaker.setdefault(speaker, []).append(row)
        return {speaker: np.array(rows) for speaker, rows in rows_by_speaker.items()}

    def speaker(self, row: int) -> str | None:
        """Return the row's speaker if it can be combined with other rows of that speaker, else None."""
        return self._speakers[row] if self.lengths[row, 2] else None

    def example(self, sequence: SequenceSpec) -> Example:
        """Build the example of a sequence."""
        parts: list[tuple[TokenSpan, PreparedSample]] = []
        if sequence.reference >= 0:
            sample = self[sequence.reference]
            if sample.reference is not None:
                parts.append((sample.reference, sample))
        for index, row in enumerate(sequence.rows):
            sample = self[row]
            parts += [(sample.prefix, sample)] if index == 0 and sequence.reference < 0 else []
            parts.append((sample.turn, sample))
        return Example(
            np.concatenate([span.ids for span, _ in parts]),
            np.concatenate([span.loss_mask for span, _ in parts]),
            tuple(sample.recordings[clip] for span, sample in parts for clip in span.clips),
        )


class BatchSampler:
    """Infinite, numbered sequence of batches: every sample once per epoch.

    Args:
        samples: the prepared samples.
        data: settings of references and turns.
        batch: settings of the batch size.
        seed: seed of all random choices.
        shuffle: False: each row is a sequence of its own, sorted by length, without random choices, for validation.

    Raises:
        BadInput: there are no samples.
    """

    def __init__(
        self, samples: PreparedDataset, data: DataSettings, batch: BatchSettings, seed: int, *, shuffle: bool = True
    ) -> None:
        if not len(samples):
            raise BadInput(f"the manifest {data.manifest!r} has no usable training sample")
        self._samples, self._data, self._batch = samples, data, batch
        self._seed, self._shuffle = seed, shuffle

    def iterate_from(self, done: int) -> Iterator[tuple[int, list[list[SequenceSpec]]]]:
        """Yield (epoch, batch) from batch number `done` on; a row of a batch has one or several packed sequences."""
        epoch = 0
        while True:
            batches = self.epoch(epoch)
            if done < len(batches):
                yield from ((epoch, rows) for rows in batches[done:])
            done = max(done - len(batches), 0)
            epoch += 1

    def epoch(self, epoch: int) -> list[list[list[SequenceSpec]]]:
        """Return all batches of an epoch."""
        if not self._shuffle:
            lengths = self._samples.lengths
            sequences = [SequenceSpec((row,), -1, int(lengths[row, :2].sum())) for row in range(len(self._samples))]
            return self._make_batches(sorted(sequences, key=lambda sequence: sequence.num_positions))
        random = np.random.default_rng([self._seed, epoch])
        sequences = self._sample_sequences(random)
        average = sum(sequence.num_positions for sequence in sequences) / len(sequences)
        pool = max(int(_POOL_BATCHES * self._batch.positions / average), 1)
        batches: list[list[list[SequenceSpec]]] = []
        for start in range(0, len(sequences), pool):
            batches += self._make_batches(
                sorted(sequences[start : start + pool], key=lambda sequence: sequence.num_positions)
            )
        return [batches[index] for index in random.permutation(len(batches))]

    # ------------------------------------------------------------------ sampling

    def _sample_sequences(self, random: np.random.Generator) -> list[SequenceSpec]:
        """Sample sequences with every row once, in random order; a speaker's rows can become consecutive turns."""
        samples, longest = self._samples, self._batch.longest
        sequences: list[SequenceSpec] = []
        pending: dict[str, tuple[list[int], int, int, int]] = {}
        for row in random.permutation(len(samples)).tolist():
            speaker = samples.speaker(row)
            turn = int(samples.lengths[row, 1])
            if speaker is None:
                sequences.append(SequenceSpec((row,), -1, int(samples.lengths[row, :2].sum())))
                continue
            rows, reference, length, num_turns = pending.pop(speaker, ([], -1, 0, 0))
            # A row must not be a target after it was the reference of the same sequence.
            if rows and (length + turn > longest or row == reference):
                sequences.append(SequenceSpec(tuple(rows), reference, length))
                rows = []
            if not rows:
                reference, length = self._sample_reference(random, row, speaker)
                num_turns = int(random.integers(1, self._data.turns + 1))
                rows = []
            rows.append(row)
            length += turn
            if len(rows) < num_turns:
                pending[speaker] = (rows, reference, length, num_turns)
            else:
                sequences.append(SequenceSpec(tuple(rows), reference, length))
        sequences += [SequenceSpec(tuple(rows), reference, length) for rows, reference, length, _ in pending.values()]
        return [sequences[index] for index in random.permutation(len(sequences))]

    def _sample_reference(self, random: np.random.Generator, row: int, speaker: str) -> tuple[int, int]:
        """Return the reference row before a first turn (−1: the row's own prefix) and its positions."""
        lengths = self._samples.lengths
        candidates = self._samples.by_speaker[speaker]
        if random.random() < self._data.reference and len(candidates) > 1:
            reference = int(random.choice(candidates[candidates != row]))
            if lengths[reference, 2] + lengths[row, 1] <= self._batch.longest:
                return reference, int(lengths[reference, 2])
        return -1, int(lengths[row, 0])

    # ------------------------------------------------------------------ batching

    def _make_batches(self, sequences: Sequence[SequenceSpec]) -> list[list[list[SequenceSpec]]]:
        """Split sequences, sorted by length, into batches."""
        rows = self._pack(sequences) if self._batch.pack else [[sequence] for sequence in sequences]
        batches: list[list[list[SequenceSpec]]] = []
        longest = 0
        for row in rows:
            length = _round_up(sum(sequence.num_positions for sequence in row))
            if batches and (len(batches[-1]) + 1) * max(longest, length) <= self._batch.positions:
                batches[-1].append(row)
                longest = max(longest, length)
            else:
                batches.append([row])
                longest = length
        return batches

    def _pack(self, sequences: Sequence[SequenceSpec]) -> list[list[SequenceSpec]]:
        """Pack sequences into rows of at most `longest` positions by first-fit decreasing."""
        rows: list[list[SequenceSpec]] = []
        free: list[int] = []
        first_open = 0
        for sequence in reversed(sequences):
            length = sequence.num_positions
            index = next((index for index in range(first_open, len(rows)) if free[index] >= length), len(rows))
            if index == len(rows):
                rows.append([])
                free.append(self._batch.longest)
            rows[index].append(sequence)
            free[index] -= length
            while first_open < len(rows) and free[first_open] < sequences[0].num_positions:
                first_open += 1
        return rows


def _round_up(length: int) -> int:
    return -(-length // TRAINING_ROUND_TO) * TRAINING_ROUND_TO
