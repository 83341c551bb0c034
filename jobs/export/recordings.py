"""Reads the recordings of a finished job with their text, in the order of its manifest.

In: an output folder. Out: `Recording`s and their `Item`s, one per script or one per chunk. All times are whole numbers
of samples of the audio file, so that durations are exact. Every item has the columns of `METADATA`. The result table is
held in memory, audio is not.
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
"""Columns to filter by. `faults` and `finish_reason` of a script are those of its chunks, joined by commas."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A recording or one of its chunks: a range of samples of the audio file, with text and metadata."""

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
        row: the result row.
        name: name of the audio file, relative to the job's output folder.
        location: path or URI of the audio file.
        extra: the manifest's columns that are not part of a script.
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
        """The row's script, with only the fields that concern text and voices."""
        columns = {name: self.row[name] for name in _SCRIPT_COLUMNS if self.row.get(name) is not None}
        for name in ("turns", "voices"):
            # Lists and maps of JSON-lines manifests are JSON strings in the results.
            if isinstance(columns.get(name), str):
                columns[name] = json.loads(columns[name])
        try:
            return Script.model_validate(columns)
        except ValueError as error:
            raise BadInput(f"the result {self.id!r} is not a valid script: {error}".replace("\n", " ")) from error

    def items(self, level: Level) -> list[Item]:
        """Return one item for the entire recording, or one per chunk that has audio."""
        chunks = [chunk for chunk in self.row["chunks"] if chunk["end_s"] > chunk["start_s"]]
        if level == "script":
            return [self._item(self.id, 0, self.num_samples, chunks, self.row["seed"])]
        items = []
        for chunk in chunks:
            start, stop = (round(chunk[end] * self.sample_rate_hz) for end in ("start_s", "end_s"))
            if start < min(stop, self.num_samples):
                item_id = f"{self.id}-{chunk['index']:05d}"
                items.append(self._item(item_id, start, min(stop, self.num_samples), [chunk], chunk["seed"]))
        return items

    def voice_id(self, speaker: str | None) -> str:
        """Return an identifier of a speaker's voice that is the same in all scripts with this voice.

        If the script does not set a voice, the model picks a new one per script, so the identifier is made of the
        script's id and the speaker.
        """
        choices = {
            self.script.speaker_name(voice.tag): voice.ref_audio or voice.name for voice in self.script.voice_choices()
        }
        first = self.script.speaker_name("SPEAKER0")
        if self.script.voices is None and choices:
            return choices[first]
        return choices.get(speaker or first) or f"{self.id}/{speaker or first}"

    def _item(self, item_id: str, start: int, stop: int, chunks: Sequence[Mapping[str, Any]], seed: int | None) -> Item:
        text = " ".join(filter(None, (plain_text(chunk["text"]) for chunk in chunks)))
        speakers = dict.fromkeys(name for chunk in chunks for name in chunk["speakers"] or [None])
        metadata = {
            "status": self.row["status"],
            "chars_per_sec": round(len(text) * self.sample_rate_hz / (stop - start), 3),
            "attempts": max((chunk["attempts"] for chunk in chunks), default=0),
            "finish_reason": _join_unique(chunk["finish_reason"] for chunk in chunks),
            "faults": _join_unique(fault for chunk in chunks for fault in chunk["faults"] or ()),
            "seed": seed,
            "model": self.row["model"],
        }
        voices = dict.fromkeys(self.voice_id(speaker) for speaker in speakers)
        return Item(item_id, start, stop - start, self.sample_rate_hz, text, ", ".join(voices), metadata)


class Recordings:
    """The recordings of an output folder; can be iterated repeatedly.

    Args:
        only_ok: exclude flagged recordings.

    Attributes:
        num_excluded: number of excluded results by reason.
        extra: fields of the manifest's columns that are not part of a script and have scalar values.

    Raises:
        BadInput: there are no results, or all are excluded.
    """

    def __init__(self, storage: StorageBackend, *, only_ok: bool = False) -> None:
        self._storage = storage
        table = read_results(storage)
        if missing := sorted({"id", "status", "audio_path", "chunks", "manifest_row"} - set(table.column_names)):
            raise BadInput(f"{storage.locate('results')} is not a result table: missing columns {', '.join(missing)}")
        order = pc.sort_indices(table, sort_keys=[("manifest_row", "ascending"), ("id", "ascending")])
        files = frozenset(storage.list_files("audio"))
        indices, self.num_excluded = [], collections.Counter[str]()
        status, paths = table["status"].to_pylist(), table["audio_path"].to_pylist()
        for index in order.to_pylist():
            reason = _exclusion_reason(status[index], paths[index], files, only_ok=only_ok)
            if reason:
                self.num_excluded[reason] += 1
            else:
                indices.append(index)
        if not indices:
            reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(self.num_excluded.items()))
            raise BadInput(f"nothing to export in {storage.uri}: {reasons}")
        self._table = table.take(pa.array(indices, pa.int64()))
        self.extra = pa.schema([field for field in table.schema if _is_extra(field)])

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[Recording]:
        for index in range(len(self._table)):
            (row,) = self._table.slice(index, 1).to_pylist()
            name = _relative_name(row["audio_path"])
            # Null and NaN mean the same as no column, as in manifests.
            values = ((column, row[column]) for column in self.extra.names)
            extra = {column: value for column, value in values if value is not None and value == value}
            yield Recording(row, name, self._storage.locate(name), extra)


def plain_text(text: str) -> str:
    """Return the text of a chunk on one line, without speaker tags and sounds."""
    return " ".join(_SOUND_TAG.sub(" ", SPEAKER_TAG.sub(" ", text)).split())


def _exclusion_reason(status: str, path: str | None, files: frozenset[str], *, only_ok: bool) -> str | None:
    """Return why a result is excluded, or None."""
    if status == "failed" or path is None:
        return "failed"
    if status == "flagged" and only_ok:
        return "flagged"
    return None if _relative_name(path) in files else "without audio file"


def _relative_name(audio_path: str) -> str:
    """Return an audio file's name relative to the job's folder, which may have been moved."""
    return "/".join(audio_path.split("/")[-3:])


def _is_extra(field: pa.Field) -> bool:
    arrow_type = field.type
    is_string_or_number = (
        pa.types.is_string(arrow_type) or pa.types.is_integer(arrow_type) or pa.types.is_floating(arrow_type)
    )
    is_known = field.name in COLUMNS.names or field.name in Script.model_fields or field.name in METADATA
    return (is_string_or_number or pa.types.is_boolean(arrow_type)) and not is_known


def _join_unique(names: Iterator[str]) -> str:
    return ",".join(dict.fromkeys(names))
