"""Writes Parquet shards that contain the audio, for Hugging Face `datasets` to load or stream.

    data/train-00000-of-00012.parquet

A shard has up to 1,000 items or about 500 MB of samples; at most one row group is in memory. The column `audio` is a
struct of a file's bytes and name, declared as an `Audio` feature in the schema's metadata. Entire recordings are stored
as their original files; chunks are extracted and stored as FLAC with the same 16-bit samples.
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
from jobs.export.recordings import METADATA, Item, Level, Recording, Recordings
from jobs.runtime.cli import atomic_file
from jobs.storage.backends import StorageBackend

SHARD_ITEMS = 1000
_SHARD_BYTES = 500_000_000
_GROUP_ITEMS, _GROUP_BYTES = 100, 64_000_000
_BYTES_PER_SAMPLE = 2
_MAX_VALUE_BYTES = 2**31 - 1
"""Maximum size of a value of Arrow's `binary` type, which `datasets` reads."""
_PREFETCH_FILES = 4
_AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

Row = dict[str, Any]


def write_shards(recordings: Recordings, source: StorageBackend, output: StorageBackend, level: Level) -> int:
    """Write all shards; return the number of items."""
    numbers = [number for _, _, number in _assign_shards(recordings, level)]
    total = numbers[-1] + 1 if numbers else 0
    schema = _schema(recordings)
    # Readers load all shards in a folder, including those of an earlier export.
    for stale in output.list_files("data"):
        if re.fullmatch(r"data/train-\d{5}-of-\d{5}\.parquet", stale):
            output.delete(stale)
    by_shard = itertools.groupby(_rows(recordings, source, level), key=lambda pair: pair[0])
    for number, rows in by_shard:
        name = f"data/train-{number:05d}-of-{total:05d}.parquet"
        with atomic_file(output, name) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for group in _row_groups(row for _, row in rows):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
    return len(numbers)


def _assign_shards(recordings: Recordings, level: Level) -> Iterator[tuple[Recording, Item, int]]:
    """Yield every item with the number of its shard, which depends only on the lengths of items."""
    number = items = size = 0
    for recording in recordings:
        for item in recording.items(level):
            num_bytes = item.num_samples * _BYTES_PER_SAMPLE
            if items and (items == SHARD_ITEMS or size + num_bytes > _SHARD_BYTES):
                number, items, size = number + 1, 0, 0
            items, size = items + 1, size + num_bytes
            yield recording, item, number


def _rows(recordings: Recordings, source: StorageBackend, level: Level) -> Iterator[tuple[int, Row]]:
    """Yield every item's shard and row; each file is read once, and a few are prefetched."""
    by_recording = (
        (recording, [(item, number) for _, item, number in group])
        for recording, group in itertools.groupby(_assign_shards(recordings, level), key=lambda triple: triple[0])
    )
    for (recording, items), content in _prefetch(by_recording, source):
        for item, number in items:
            if level == "script":
                audio = {"bytes": content, "path": recording.name.rpartition("/")[2]}
            else:
                audio = {"bytes": _extract(recording, content, item), "path": f"{item.id}.flac"}
            if len(audio["bytes"]) > _MAX_VALUE_BYTES:
                raise BadInput(f"{recording.location} is larger than 2 GiB, the limit of a row; use --level chunk")
            yield number, _row(recording, item, audio)


def _prefetch(
    recordings: Iterable[tuple[Recording, Any]], source: StorageBackend
) -> Iterator[tuple[tuple[Recording, Any], bytes]]:
    with concurrent.futures.ThreadPoolExecutor(_PREFETCH_FILES) as pool:
        pending: collections.deque[tuple[tuple[Recording, Any], concurrent.futures.Future[bytes]]] = collections.deque()
        for entry in recordings:
            pending.append((entry, pool.submit(source.read, entry[0].name)))
            if len(pending) >= _PREFETCH_FILES:
                oldest, content = pending.popleft()
                yield oldest, content.result()
        for oldest, content in pending:
            yield oldest, content.result()


def _extract(recording: Recording, content: bytes, item: Item) -> bytes:
    """Return the samples of an item as FLAC."""
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            file.seek(item.start_sample)
            samples = file.read(item.num_samples, dtype="int16")
    except soundfile.LibsndfileError as error:
        raise BadInput(f"{recording.location} cannot be decoded: {error.error_string}") from error
    flac = io.BytesIO()
    soundfile.write(flac, samples, item.sample_rate_hz, format="FLAC", subtype="PCM_16")
    return flac.getvalue()


def _row(recording: Recording, item: Item, audio: Mapping[str, Any]) -> Row:
    columns = {
        "id": item.id,
        "audio": audio,
        "text": item.text,
        "speaker": item.speaker,
        "language": recording.script.language,
        "duration": item.duration_s,
        "sample_rate": item.sample_rate_hz,
    }
    return {**recording.extra, **columns, **item.metadata}


def _row_groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Batch rows into row groups."""
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
    columns = {
        "id": pa.string(),
        "audio": _AUDIO,
        "text": pa.string(),
        "speaker": pa.string(),
        "language": pa.string(),
        "duration": pa.float64(),
        "sample_rate": pa.int32(),
        **METADATA,
    }
    all_columns = columns | {field.name: field.type for field in recordings.extra if field.name not in columns}
    features = {name: _feature(arrow_type) for name, arrow_type in all_columns.items()}
    return pa.schema(all_columns).with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(arrow_type: pa.DataType) -> dict[str, str]:
    """Return a column's feature in the notation of `datasets`."""
    if arrow_type == _AUDIO:
        return {"_type": "Audio"}
    return {"dtype": {"double": "float64", "float": "float32"}.get(str(arrow_type), str(arrow_type)), "_type": "Value"}
