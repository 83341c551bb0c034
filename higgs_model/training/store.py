"""Prepared samples on disk: tokens, codes and 16 kHz samples.

A shard is a memory-mapped safetensors file, written atomically: the concatenated token spans of all rows, the
concatenated codes and samples of all their recordings, and the start offsets of each. Ids, speakers and row errors are
in its header.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from higgs_model.training.samples import TokenSpan

SAMPLE_RATE_HZ = 16_000
"""Sample rate of the audio tower."""
_SPANS = ("prefix", "turn", "reference")
PositionFunction = Callable[[int, int], int]
"""Function of the number of frames and of samples that returns the number of positions."""


@dataclasses.dataclass(frozen=True)
class PreparedAudio:
    """A recording in the representations that the network requires.

    Attributes:
        codes_KT: (K, T), or None.
        samples_N: (N,) at `SAMPLE_RATE_HZ` with full scale ±32767, or None.
    """

    codes_KT: NDArray[np.int16] | None
    samples_N: NDArray[np.int16] | None


@dataclasses.dataclass(frozen=True)
class PreparedSample:
    """A `Sample` with its prepared recordings, in the order of `Sample.sources`."""

    id: str
    speaker: str | None
    prefix: TokenSpan
    turn: TokenSpan
    reference: TokenSpan | None
    recordings: tuple[PreparedAudio, ...]


def write_shard(path: Path, samples: Sequence[PreparedSample], row_errors: Sequence[str], num_codebooks: int) -> None:
    """Write a shard atomically."""
    empty = TokenSpan(np.empty(0, np.int32), np.empty(0, np.bool_), ())
    spans = [getattr(sample, name) or empty for sample in samples for name in _SPANS]
    recordings = [recording for sample in samples for recording in sample.recordings]
    no_codes, no_samples = np.empty((num_codebooks, 0), np.int16), np.empty(0, np.int16)
    codes = [no_codes if recording.codes_KT is None else recording.codes_KT for recording in recordings]
    waves = [no_samples if recording.samples_N is None else recording.samples_N for recording in recordings]
    arrays = {
        "ids": np.concatenate([np.empty(0, np.int32), *(span.ids for span in spans)]),
        "trained": np.concatenate([np.empty(0, np.bool_), *(span.loss_mask for span in spans)]),
        "clips": np.array([clip for span in spans for clip in span.clips], np.int64),
        "codes_TK": np.concatenate([no_codes, *codes], axis=1).T,
        "samples": np.concatenate([no_samples, *waves]),
        "ids_start": _starts([len(span.ids) for span in spans]),
        "clips_start": _starts([len(span.clips) for span in spans]),
        "recordings_start": _starts([len(sample.recordings) for sample in samples]),
        "codes_start": _starts([codes_KT.shape[1] for codes_KT in codes]),
        "samples_start": _starts([len(samples_N) for samples_N in waves]),
        "has_reference": np.array([sample.reference is not None for sample in samples], np.bool_),
    }
    header = {
        "ids": [sample.id for sample in samples],
        "speakers": [sample.speaker for sample in samples],
        "faults": list(row_errors),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    save_file(tensors, draft, metadata={name: json.dumps(value) for name, value in header.items()})
    os.replace(draft, path)


def _starts(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def read_header(path: Path) -> dict[str, Any]:
    """Return a shard's header: ids, speakers and row errors (`faults`)."""
    with safe_open(path, framework="pt") as file:
        return {name: json.loads(value) for name, value in file.metadata().items()}


class Shard:
    """A memory-mapped shard of prepared samples."""

    def __init__(self, path: Path) -> None:
        self.header = read_header(path)
        with safe_open(path, framework="pt") as file:
            self._arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118  (not a dict)

    def __len__(self) -> int:
        return len(self.header["ids"])

    @property
    def row_errors(self) -> list[str]:
        """Error messages of the invalid rows, which are not in the shard."""
        errors: list[str] = self.header["faults"]
        return errors

    def __getitem__(self, row: int) -> PreparedSample:
        prefix, turn, reference = (self._span(row, index) for index in range(len(_SPANS)))
        first, last = self._bounds("recordings_start", row)
        return PreparedSample(
            id=self.header["ids"][row],
            speaker=self.header["speakers"][row],
            prefix=prefix,
            turn=turn,
            reference=reference if self._arrays["has_reference"][row] else None,
            recordings=tuple(self._recording(index) for index in range(first, last)),
        )

    def lengths(
        self, placeholders: tuple[int, int], input_positions: PositionFunction, output_positions: PositionFunction
    ) -> NDArray[np.int64]:
        """Return the positions (rows, 3) of each row's prefix, turn and reference; 0 for no reference.

        Args:
            placeholders: the placeholder tokens of input recordings and output clips.
            input_positions, output_positions: functions that return their expanded positions.
        """
        arrays = self._arrays
        is_placeholder = np.isin(arrays["ids"], placeholders)
        num_spans = len(self) * len(_SPANS)
        spans = np.repeat(np.arange(num_spans), np.diff(arrays["clips_start"]))
        recordings = arrays["recordings_start"][spans // len(_SPANS)] + arrays["clips"]
        frames, samples = np.diff(arrays["codes_start"])[recordings], np.diff(arrays["samples_start"])[recordings]
        # A placeholder itself is one of the ids.
        extra = [
            (input_positions if placeholder == placeholders[0] else output_positions)(int(num_frames), int(num_samples))
            - 1
            for placeholder, num_frames, num_samples in zip(arrays["ids"][is_placeholder], frames, samples, strict=True)
        ]
        lengths = np.diff(arrays["ids_start"]) + np.bincount(spans, extra, num_spans).astype(np.int64)
        return lengths.reshape(-1, len(_SPANS))

    @property
    def speakers(self) -> list[str | None]:
        """Speaker of each row; None: unknown."""
        speakers: list[str | None] = self.header["speakers"]
        return speakers

    def _bounds(self, name: str, index: int) -> tuple[int, int]:
        starts = self._arrays[name]
        return int(starts[index]), int(starts[index + 1])

    def _span(self, row: int, offset: int) -> TokenSpan:
        index = row * len(_SPANS) + offset
        ids, clips = slice(*self._bounds("ids_start", index)), slice(*self._bounds("clips_start", index))
        return TokenSpan(
            self._arrays["ids"][ids], self._arrays["trained"][ids], tuple(self._arrays["clips"][clips].tolist())
        )

    def _recording(self, index: int) -> PreparedAudio:
        codes, samples = slice(*self._bounds("codes_start", index)), slice(*self._bounds("samples_start", index))
        return PreparedAudio(
            self._arrays["codes_TK"][codes].T if codes.start < codes.stop else None,
            self._arrays["samples"][samples] if samples.start < samples.stop else None,
        )
