"""Writes manifests that refer to the job's audio files: NeMo's JSON lines, and Lhotse's recordings and supervisions.

No audio is copied. Durations are numbers of samples divided by the sample rate.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, cast

from jobs.export.recordings import Item, Level, Recording, Recordings
from jobs.runtime.cli import atomic_file
from jobs.storage.backends import StorageBackend


def write_nemo(recordings: Recordings, output: StorageBackend, level: Level) -> int:
    """Write `manifest.jsonl`, one line per item, with an `offset` for chunks; return the number of items."""
    count = 0
    with atomic_file(output, "manifest.jsonl") as path, path.open("wb") as file:
        for recording in recordings:
            for item in recording.items(level):
                file.write(_json_line(_nemo_entry(recording, item, level)))
                count += 1
    return count


def write_lhotse(recordings: Recordings, output: StorageBackend, level: Level) -> int:
    """Write `recordings.jsonl.gz` and `supervisions.jsonl.gz`; return the number of supervisions."""
    count = 0
    with (
        _open_gzip(output, "recordings.jsonl.gz") as recordings_file,
        _open_gzip(output, "supervisions.jsonl.gz") as supervisions_file,
    ):
        for recording in recordings:
            recordings_file.write(_json_line(_lhotse_recording(recording)))
            for item in recording.items(level):
                supervisions_file.write(_json_line(_lhotse_supervision(recording, item)))
                count += 1
    return count


def _nemo_entry(recording: Recording, item: Item, level: Level) -> dict[str, Any]:
    offset = {"offset": item.start_s} if level == "chunk" else {}
    return {
        **recording.extra,
        "audio_filepath": recording.location,
        **offset,
        "duration": item.duration_s,
        "text": item.text,
        "speaker": item.speaker,
        "id": item.id,
        **_language_field(recording),
        **item.metadata,
    }


def _lhotse_recording(recording: Recording) -> dict[str, Any]:
    kind = "url" if "://" in recording.location else "file"
    return {
        "id": recording.id,
        "sources": [{"type": kind, "channels": [0], "source": recording.location}],
        "sampling_rate": recording.sample_rate_hz,
        "num_samples": recording.num_samples,
        "duration": recording.num_samples / recording.sample_rate_hz,
        "channel_ids": [0],
    }


def _lhotse_supervision(recording: Recording, item: Item) -> dict[str, Any]:
    return {
        "id": item.id,
        "recording_id": recording.id,
        "start": item.start_s,
        "duration": item.duration_s,
        "channel": 0,
        "text": item.text,
        "speaker": item.speaker,
        **_language_field(recording),
        "custom": {**recording.extra, **item.metadata},
    }


def _language_field(recording: Recording) -> dict[str, str]:
    return {"language": recording.script.language} if recording.script.language else {}


def _json_line(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


@contextlib.contextmanager
def _open_gzip(output: StorageBackend, name: str) -> Iterator[BinaryIO]:
    """Open a gzip file for writing, with a constant time stamp so that the output is deterministic."""
    with (
        atomic_file(output, name) as path,
        path.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file,
    ):
        yield cast(BinaryIO, file)
