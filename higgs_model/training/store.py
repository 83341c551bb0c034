"""Prepared samples on disk: tokens, codes and samples, ready to be batched.

A shard is one safetensors file, whole or absent, and mapped into memory: the stretches of tokens of all its rows one
after the other, the codes and 16 kHz samples of all their recordings one after the other, and where each begins. Ids,
speakers and faults are in its header.
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

from higgs_model.training.samples import Tokens

SAMPLE_RATE_HZ = 16_000
"""Of the samples that the audio tower hears."""
_STRETCHES = ("head", "turn", "reference")
Length = Callable[[int, int], int]
"""Positions, from frames and samples."""


@dataclasses.dataclass(frozen=True)
class Heard:
    """One recording, in the forms that the network takes: codes (K, T), samples (N,) of full scale ±32767."""

    codes_KT: NDArray[np.int16] | None
    samples_N: NDArray[np.int16] | None


@dataclasses.dataclass(frozen=True)
class PreparedSample:
    """A `Sample` whose recordings have been read; `recordings` stand in the order of its sources."""

    id: str
    speaker: str | None
    head: Tokens
    turn: Tokens
    reference: Tokens | None
    recordings: tuple[Heard, ...]


def write_shard(path: Path, samples: Sequence[PreparedSample], faults: Sequence[str], num_codebooks: int) -> None:
    """Write one shard; it has its name when it is whole."""
    none = Tokens(np.empty(0, np.int32), np.empty(0, np.bool_), ())
    stretches = [getattr(sample, name) or none for sample in samples for name in _STRETCHES]
    recordings = [recording for sample in samples for recording in sample.recordings]
    no_codes, no_samples = np.empty((num_codebooks, 0), np.int16), np.empty(0, np.int16)
    codes = [no_codes if one.codes_KT is None else one.codes_KT for one in recordings]
    waves = [no_samples if one.samples_N is None else one.samples_N for one in recordings]
    arrays = {
        "ids": np.concatenate([np.empty(0, np.int32), *(one.ids for one in stretches)]),
        "trained": np.concatenate([np.empty(0, np.bool_), *(one.trained for one in stretches)]),
        "clips": np.array([clip for one in stretches for clip in one.clips], np.int64),
        "codes_TK": np.concatenate([no_codes, *codes], axis=1).T,
        "samples": np.concatenate([no_samples, *waves]),
        "ids_start": _starts([len(one.ids) for one in stretches]),
        "clips_start": _starts([len(one.clips) for one in stretches]),
        "recordings_start": _starts([len(one.recordings) for one in samples]),
        "codes_start": _starts([one.shape[1] for one in codes]),
        "samples_start": _starts([len(one) for one in waves]),
        "has_reference": np.array([one.reference is not None for one in samples], np.bool_),
    }
    told = {"ids": [one.id for one in samples], "speakers": [one.speaker for one in samples], "faults": list(faults)}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    save_file(tensors, draft, metadata={name: json.dumps(value) for name, value in told.items()})
    os.replace(draft, path)


def _starts(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def read_header(path: Path) -> dict[str, Any]:
    """What a shard says of its rows: ids, speakers, faults."""
    with safe_open(path, framework="pt") as file:
        return {name: json.loads(value) for name, value in file.metadata().items()}


class Shard:
    """One file of prepared samples, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.header = read_header(path)
        with safe_open(path, framework="pt") as file:
            self._arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118  (not a dict)

    def __len__(self) -> int:
        return len(self.header["ids"])

    @property
    def faults(self) -> list[str]:
        """Rows that are not in it, and why."""
        faults: list[str] = self.header["faults"]
        return faults

    def __getitem__(self, row: int) -> PreparedSample:
        head, turn, reference = (self._stretch(row, place) for place in range(len(_STRETCHES)))
        first, last = self._span("recordings_start", row)
        return PreparedSample(
            id=self.header["ids"][row],
            speaker=self.header["speakers"][row],
            head=head,
            turn=turn,
            reference=reference if self._arrays["has_reference"][row] else None,
            recordings=tuple(self._recording(at) for at in range(first, last)),
        )

    def lengths(self, kinds: tuple[int, int], heard: Length, said: Length) -> NDArray[np.int64]:
        """(rows, 3) positions that each row's head, turn and reference take in a network; 0 for no reference.

        Args:
            kinds: the placeholders of what is heard and of what is said.
            heard, said: the positions that so many frames and samples take in place of such a placeholder.
        """
        arrays = self._arrays
        is_placeholder = np.isin(arrays["ids"], kinds)
        owners = np.repeat(np.arange(len(self) * len(_STRETCHES)), np.diff(arrays["clips_start"]))
        at = arrays["recordings_start"][owners // len(_STRETCHES)] + arrays["clips"]
        frames, samples = np.diff(arrays["codes_start"])[at], np.diff(arrays["samples_start"])[at]
        taken = [
            (heard if kind == kinds[0] else said)(int(one), int(other)) - 1
            for kind, one, other in zip(arrays["ids"][is_placeholder], frames, samples, strict=True)
        ]
        lengths = np.diff(arrays["ids_start"]) + np.bincount(owners, taken, len(self) * len(_STRETCHES)).astype(
            np.int64
        )
        return lengths.reshape(-1, len(_STRETCHES))

    @property
    def speakers(self) -> list[str | None]:
        """Of each row, if it is known."""
        speakers: list[str | None] = self.header["speakers"]
        return speakers

    def _span(self, name: str, at: int) -> tuple[int, int]:
        starts = self._arrays[name]
        return int(starts[at]), int(starts[at + 1])

    def _stretch(self, row: int, place: int) -> Tokens:
        at = row * len(_STRETCHES) + place
        ids, clips = slice(*self._span("ids_start", at)), slice(*self._span("clips_start", at))
        return Tokens(
            self._arrays["ids"][ids], self._arrays["trained"][ids], tuple(self._arrays["clips"][clips].tolist())
        )

    def _recording(self, at: int) -> Heard:
        codes, samples = slice(*self._span("codes_start", at)), slice(*self._span("samples_start", at))
        return Heard(
            self._arrays["codes_TK"][codes].T if codes.start < codes.stop else None,
            self._arrays["samples"][samples] if samples.start < samples.stop else None,
        )
