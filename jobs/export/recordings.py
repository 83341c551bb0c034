"""The recordings of a finished job in the order of its manifest, with their text.

In: an output folder. Out: `Recording`s, and their `Item`s: one per script, or one per chunk. All times are whole
numbers of samples of the audio file, so that durations are exact. The result table is held in memory, audio is not.
Every item has the columns of `METADATA` to filter by.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from higgs_model.errors import BadInput
from higgs_model.script.chunking import SPEAKER_TAG
from higgs_model.script.script import Script
from jobs.storage.backends import StorageBackend
from jobs.storage.result_table import COLUMNS, read_results

Level = Literal["script", "chunk"]

_SOUND_TAG = re.compile(r"<SE(?:_[se])?>[^<]{0,80}</SE(?:_[se])?>")
_SCRIPT_COLUMNS = ("id", "text", "turns", "voice", "voices", "ref_audio", "ref_text", "language")
METADATA: dict[str, pa.DataType] = {
    "status": pa.string(),
    "chars_per_sec": pa.float64(),
    "attempts": pa.int64(),
    "finish_reason": pa.string(),
    "faults": pa.string(),
    "seed": pa.int64(),
    "model": pa.string(),
}
"""Columns to filter by; for a whole script, `faults` and `finish_reason` are those of its chunks, joined by commas."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A recording or a chunk of it: samples [start, start + num) of its file, and their text."""

    id: str
    start_sample: int
    num_samples: int
    sample_rate_hz: int
    text: str
    speaker: str
    metadata: Mapping[str, Any]

    @property
    def start_s(self) -> float:
        return self.start_sample / self.sample_rate_hz

    @property
    def duration_s(self) -> float:
        return self.num_samples / self.sample_rate_hz


@dataclasses.dataclass(frozen=True)
class Recording:
    """A result row that has audio.

    Attributes:
        name: of the audio file, relative to the job's folder.
        location: its path or URI.
        extra: the manifest's columns that are not part of the script.
    """

    row: Mapping[str, Any]
    name: str
    location: str
    extra: Mapping[str, Any]

    @property
    def id(self) -> str:
        return str(self.row["id"])

    @property
    def sample_rate_hz(self) -> int:
        return int(self.row["sample_rate"])

    @property
    def num_samples(self) -> int:
        return round(self.row["duration_s"] * self.sample_rate_hz)

    @functools.cached_property
    def script(self) -> Script:
        """The row's script, with the fields that concern text and voices."""
        columns = {name: self.row[name] for name in _SCRIPT_COLUMNS if self.row.get(name) is not None}
        for name in ("turns", "voices"):
            # Lists and maps from JSON-lines manifests are JSON text in the results.
            if isinstance(columns.get(name), str):
                columns[name] = json.loads(columns[name])
        try:
            return Script.model_validate(columns)
        except ValueError as error:
            raise BadInput(f"the result {self.id!r} is not a valid script: {error}".replace("\n", " ")) from error

    def items(self, level: Level) -> list[Item]:
        """Return the whole recording as an item, or one item per chunk with audio."""
        chunks = [chunk for chunk in self.row["chunks"] if chunk["end_s"] > chunk["start_s"]]
        if level == "script":
            return [self._item(self.id, 0, self.num_samples, chunks, self.row["seed"])]
        items = []
        for chunk in chunks:
            start, stop = (round(chunk[end] * self.sample_rate_hz) for end in ("start_s", "end_s"))
            if start < min(stop, self.num_samples):
                identity = f"{self.id}-{chunk['index']:05d}"
                items.append(self._item(identity, start, min(stop, self.num_samples), [chunk], chunk["seed"]))
        return items

    def voice_of(self, speaker: str | None) -> str:
        """Return an identifier of a speaker's voice, which is the same in every script with this voice.

        Without a voice the model picks a new one per script, so the identifier has the script's id and the speaker.
        """
        choices = {
            self.script.speaker_name(voice.tag): voice.ref_audio or voice.name for voice in self.script.voice_choices()
        }
        first = self.script.speaker_name("SPEAKER0")
        if self.script.voices is None and choices:
            return choices[first]
        return choices.get(speaker or first) or f"{self.id}/{speaker or first}"

    def _item(
        self, identity: str, start: int, stop: int, chunks: Sequence[Mapping[str, Any]], seed: int | None
    ) -> Item:
        text = " ".join(filter(None, (plain_text(chunk["text"]) for chunk in chunks)))
        speakers = dict.fromkeys(name for chunk in chunks for name in chunk["speakers"] or [None])
        metadata = {
            "status": self.row["status"],
            "chars_per_sec": round(len(text) * self.sample_rate_hz / (stop - start), 3),
            "attempts": max((chunk["attempts"] for chunk in chunks), default=0),
            "finish_reason": _joined(chunk["finish_reason"] for chunk in chunks),
            "faults": _joined(fault for chunk in chunks for fault in chunk["faults"] or ()),
            "seed": seed,
            "model": self.row["model"],
        }
        voices = dict.fromkeys(self.voice_of(speaker) for speaker in speakers)
        return Item(identity, start, stop - start, self.sample_rate_hz, text, ", ".join(voices), metadata)


class Recordings:
    """The recordings of an output folder; can be iterated any number of times.

    Args:
        only_ok: leave out flagged recordings.

    Attributes:
        left_out: the number of results left out, by reason.

    Raises:
        BadInput: there are no results, or all are left out.
    """

    def __init__(self, folder: StorageBackend, *, only_ok: bool = False) -> None:
        self._folder = folder
        table = read_results(folder)
        if missing := sorted({"id", "status", "audio_path", "chunks", "manifest_row"} - set(table.column_names)):
            raise BadInput(
                f"{folder.locate('results')} are not a job's results: they lack the column {', '.join(missing)}"
            )
        order = pc.sort_indices(table, sort_keys=[("manifest_row", "ascending"), ("id", "ascending")])
        files = frozenset(folder.list_files("audio"))
        kept, self.left_out = [], collections.Counter[str]()
        status, paths = table["status"].to_pylist(), table["audio_path"].to_pylist()
        for index in order.to_pylist():
            reason = _reason(status[index], paths[index], files, only_ok=only_ok)
            if reason:
                self.left_out[reason] += 1
            else:
                kept.append(index)
        if not kept:
            reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(self.left_out.items()))
            raise BadInput(f"nothing to export in {folder.uri}: {reasons}")
        self._table = table.take(pa.array(kept, pa.int64()))
        self.extra = pa.schema([field for field in table.schema if _is_extra(field)])
        """The manifest's own columns with scalar values."""

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[Recording]:
        for index in range(len(self._table)):
            (row,) = self._table.slice(index, 1).to_pylist()
            name = _name(row["audio_path"])
            # Null and NaN mean the same as no column, as in manifests.
            values = ((column, row[column]) for column in self.extra.names)
            extra = {column: value for column, value in values if value is not None and value == value}
            yield Recording(row, name, self._folder.locate(name), extra)


def plain_text(text: str) -> str:
    """Return the text of a chunk on one line, without speaker and sound tags."""
    return " ".join(_SOUND_TAG.sub(" ", SPEAKER_TAG.sub(" ", text)).split())


def _reason(status: str, path: str | None, files: frozenset[str], *, only_ok: bool) -> str | None:
    """Return why a result is left out, or None."""
    if status == "failed" or path is None:
        return "failed"
    if status == "flagged" and only_ok:
        return "flagged"
    return None if _name(path) in files else "without its audio file"


def _name(audio_path: str) -> str:
    """Return a file's name relative to the job's folder, which may have been moved."""
    return "/".join(audio_path.split("/")[-3:])


def _is_extra(field: pa.Field) -> bool:
    kind = field.type
    simple = pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    known = field.name in COLUMNS.names or field.name in Script.model_fields or field.name in METADATA
    return (simple or pa.types.is_boolean(kind)) and not known


def _joined(names: Iterator[str]) -> str:
    return ",".join(dict.fromkeys(names))
