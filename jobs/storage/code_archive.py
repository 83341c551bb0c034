"""Stores takes: finished segments of unfinished scripts, and the codes of finished ones (`--keep-codes`).

A file is an `.npz` of two arrays: `codes`, the concatenated codes of the chunks, and `facts`, their takes' metadata as
JSON. Reading a file restores exactly the takes that were written. An unreadable segment counts as missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from higgs_model.synthesizer.records import Codes, SynthesizedChunk, Take, TakeMetadata
from jobs.storage.backends import StorageBackend


class SegmentArchive:
    """Stores the finished segments of one script; see `higgs_model.synthesizer.synthesizer.SegmentStore`."""

    def __init__(self, storage: StorageBackend, script_id: str, script_sha256: str) -> None:
        shard = hashlib.sha256(script_id.encode()).hexdigest()[:2]
        self._storage, self._prefix = storage, f"partial/{shard}/{script_id}-{script_sha256[:16]}"

    def load(self, segment: range) -> Sequence[Take] | None:
        try:
            takes = unpack_takes(self._storage.read(self._name(segment)))
        except (FileNotFoundError, ValueError, KeyError, zipfile.BadZipFile, TypeError):
            return None
        return takes if [take.index for take in takes] == list(segment) else None

    def save(self, segment: range, takes: Sequence[Take]) -> None:
        self._storage.write(self._name(segment), _pack(takes, {}))

    def delete(self) -> None:
        """Delete all segments, because the script is finished."""
        for name in self._storage.list_files(self._prefix):
            self._storage.delete(name)

    def _name(self, segment: range) -> str:
        return f"{self._prefix}/{segment.start:06d}-{segment.stop:06d}.npz"


def pack_takes(chunks: Sequence[SynthesizedChunk]) -> bytes:
    """Serialize the takes of a script and the sample ranges of its chunks."""
    metadata = {"sample_rate_hz": chunks[0].sample_rate_hz if chunks else 0}
    sample_ranges = {"places": [[chunk.start_sample, chunk.stop_sample] for chunk in chunks]}
    return _pack([chunk.take for chunk in chunks], metadata | sample_ranges)


def unpack_takes(content: bytes) -> list[Take]:
    """Deserialize the takes of a file; raise ValueError or KeyError if it is invalid."""
    return _unpack(*_open(content))


def unpack_recording(content: bytes) -> ArchivedRecording:
    """Deserialize the output of `pack_takes`; raise ValueError or KeyError if it is invalid."""
    metadata, codes_KT = _open(content)
    takes = _unpack(metadata, codes_KT)
    sample_ranges = [(int(start), int(stop)) for start, stop in metadata["places"]]
    if len(sample_ranges) != len(takes):
        raise ValueError(f"{len(takes)} takes with {len(sample_ranges)} sample ranges")
    return ArchivedRecording(tuple(takes), tuple(sample_ranges), int(metadata["sample_rate_hz"]))


@dataclasses.dataclass(frozen=True)
class ArchivedRecording:
    """The takes of a script, and each chunk's range [start, stop) of samples of the recording."""

    takes: tuple[Take, ...]
    sample_ranges: tuple[tuple[int, int], ...]
    sample_rate_hz: int


def _open(content: bytes) -> tuple[dict[str, Any], Codes]:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return json.loads(file["facts"].tobytes()), file["codes"]


def _unpack(metadata: dict[str, Any], codes_KT: Codes) -> list[Take]:
    takes, start = [], 0
    for take in metadata["takes"]:
        attempts = tuple(_attempt(fields) for fields in take["attempts"])
        frames = attempts[take["kept"]].frames
        takes.append(Take(take["index"], codes_KT[:, start : start + frames], attempts, take["kept"]))
        start += frames
    if start != codes_KT.shape[1]:
        raise ValueError(f"{codes_KT.shape[1]} frames for takes of {start}")
    return takes


def _pack(takes: Sequence[Take], extra: dict[str, Any]) -> bytes:
    metadata = [
        {
            "index": take.index,
            "kept": take.attempt_index,
            "attempts": [dataclasses.asdict(attempt) for attempt in take.attempts],
        }
        for take in takes
    ]
    content = json.dumps({"takes": metadata} | extra).encode()
    file = io.BytesIO()
    np.savez_compressed(
        file,
        codes=np.concatenate([take.codes_KT for take in takes], axis=1),
        facts=np.frombuffer(content, np.uint8),
    )
    return file.getvalue()


def _attempt(fields: dict[str, Any]) -> TakeMetadata:
    with contextlib.suppress(TypeError):
        return TakeMetadata(**fields | {"faults": tuple(fields["faults"]), "notes": tuple(fields["notes"])})
    raise ValueError(f"an attempt with the fields {sorted(fields)}")
