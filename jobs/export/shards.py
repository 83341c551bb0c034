"""Parquet shards with the audio inside, as Hugging Face's `datasets` loads and streams them.

    data/train-00000-of-00012.parquet

A shard has up to 1,000 items or about 500 MB of samples; at no time more than a row group of one is in memory. The
column `audio` is a struct of the file's bytes and its name; the schema's metadata say to `datasets` that it is audio.
Whole recordings go in as their files are; chunks are cut out and stored as FLAC of the same 16-bit samples.
"""

from __future__ import annotations

import collections
import concurrent.futures
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from higgs_model.errors import BadInput
from jobs.export.recordings import FACTS, Item, Level, Recording, Recordings
from jobs.runtime.cli import atomic_file
from jobs.storage.backends import StorageBackend

SHARD_ITEMS = 1000
_SHARD_BYTES = 500_000_000
_GROUP_ITEMS, _GROUP_BYTES = 100, 64_000_000
_BYTES_A_SAMPLE = 2
_MOST_BYTES = 2**31 - 1
"""What one value of Arrow's `binary`, which `datasets` reads, can hold."""
_READ_AHEAD = 4
_AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

Row = dict[str, Any]


def write_shards(recordings: Recordings, source: StorageBackend, output: StorageBackend, level: Level) -> int:
    """Write all shards; gives the number of items."""
    numbers = [number for _, _, number in _numbered(recordings, level)]
    total = numbers[-1] + 1 if numbers else 0
    schema = _schema(recordings)
    # A reader takes all shards that it finds, those of an earlier export, too.
    for old in output.list_files("data"):
        if re.fullmatch(r"data/train-\d{5}-of-\d{5}\.parquet", old):
            output.delete(old)
    by_shard = itertools.groupby(_rows(recordings, source, level), key=lambda pair: pair[0])
    for number, rows in by_shard:
        name = f"data/train-{number:05d}-of-{total:05d}.parquet"
        with atomic_file(output, name) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for group in _groups(row for _, row in rows):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
    return len(numbers)


def _numbered(recordings: Recordings, level: Level) -> Iterator[tuple[Recording, Item, int]]:
    """Every item and the number of its shard, which follows from the lengths alone."""
    number = items = size = 0
    for recording in recordings:
        for item in recording.items(level):
            more = item.num_samples * _BYTES_A_SAMPLE
            if items and (items == SHARD_ITEMS or size + more > _SHARD_BYTES):
                number, items, size = number + 1, 0, 0
            items, size = items + 1, size + more
            yield recording, item, number


def _rows(recordings: Recordings, source: StorageBackend, level: Level) -> Iterator[tuple[int, Row]]:
    """Every item's shard and row; files are read once, a few ahead."""
    by_recording = (
        (recording, [(item, number) for _, item, number in group])
        for recording, group in itertools.groupby(_numbered(recordings, level), key=lambda triple: triple[0])
    )
    for (recording, items), content in _with_content(by_recording, source):
        for item, number in items:
            if level == "script":
                audio = {"bytes": content, "path": recording.name.rpartition("/")[2]}
            else:
                audio = {"bytes": _cut(recording, content, item), "path": f"{item.id}.flac"}
            if len(audio["bytes"]) > _MOST_BYTES:
                raise BadInput(
                    f"{recording.location} is larger than 2 GiB, more than a row can hold; use --level chunk"
                )
            yield number, _row(recording, item, audio)


def _with_content(
    recordings: Iterable[tuple[Recording, Any]], source: StorageBackend
) -> Iterator[tuple[tuple[Recording, Any], bytes]]:
    with concurrent.futures.ThreadPoolExecutor(_READ_AHEAD) as pool:
        waiting: collections.deque[tuple[tuple[Recording, Any], concurrent.futures.Future[bytes]]] = collections.deque()
        for one in recordings:
            waiting.append((one, pool.submit(source.read, one[0].name)))
            if len(waiting) >= _READ_AHEAD:
                first, content = waiting.popleft()
                yield first, content.result()
        for first, content in waiting:
            yield first, content.result()


def _cut(recording: Recording, content: bytes, item: Item) -> bytes:
    """A part of a recording as FLAC."""
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            file.seek(item.start_sample)
            samples = file.read(item.num_samples, dtype="int16")
    except soundfile.LibsndfileError as error:
        raise BadInput(f"{recording.location} is no recording that can be read: {error.error_string}") from error
    made = io.BytesIO()
    soundfile.write(made, samples, item.sample_rate_hz, format="FLAC", subtype="PCM_16")
    return made.getvalue()


def _row(recording: Recording, item: Item, audio: Mapping[str, Any]) -> Row:
    own = {
        "id": item.id,
        "audio": audio,
        "text": item.text,
        "speaker": item.speaker,
        "language": recording.script.language,
        "duration": item.duration_s,
        "sample_rate": item.sample_rate_hz,
    }
    return {**recording.extra, **own, **item.facts}


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows together that are written together."""
    group: list[Row] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row["audio"]["bytes"])
        if len(group) == _GROUP_ITEMS or size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _schema(recordings: Recordings) -> pa.Schema:
    own = {
        "id": pa.string(),
        "audio": _AUDIO,
        "text": pa.string(),
        "speaker": pa.string(),
        "language": pa.string(),
        "duration": pa.float64(),
        "sample_rate": pa.int32(),
        **FACTS,
    }
    columns = own | {field.name: field.type for field in recordings.extra if field.name not in own}
    features = {name: _feature(kind) for name, kind in columns.items()}
    return pa.schema(columns).with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> dict[str, str]:
    """A column's type as `datasets` names it."""
    if kind == _AUDIO:
        return {"_type": "Audio"}
    return {"dtype": {"double": "float64", "float": "float32"}.get(str(kind), str(kind)), "_type": "Value"}
