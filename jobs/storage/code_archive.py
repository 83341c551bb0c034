"""Takes on the disk: finished segments of scripts under way, and the codes of finished ones if the job keeps them.

A file holds the codes of its chunks one after the other, and what is to be known of each take as JSON beside them;
reading it gives the very takes that were written. A file that cannot be read is as good as none.
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

from higgs_model.synthesizer.records import Attempt, Codes, SpokenChunk, Take
from jobs.storage.backends import Folder


class KeptSegments:
    """The finished segments of one script; see `higgs_model.synthesizer.synthesizer.SegmentStore`."""

    def __init__(self, folder: Folder, identity: str, script_sha256: str) -> None:
        shard = hashlib.sha256(identity.encode()).hexdigest()[:2]
        self._folder, self._place = folder, f"partial/{shard}/{identity}-{script_sha256[:16]}"

    def load(self, segment: range) -> Sequence[Take] | None:
        try:
            takes = unpack_takes(self._folder.get(self._name(segment)))
        except (FileNotFoundError, ValueError, KeyError, zipfile.BadZipFile, TypeError):
            return None
        return takes if [take.index for take in takes] == list(segment) else None

    def save(self, segment: range, takes: Sequence[Take]) -> None:
        self._folder.put(self._name(segment), _pack(takes, {}))

    def forget(self) -> None:
        """The script is done."""
        for name in self._folder.names(self._place):
            self._folder.delete(name)

    def _name(self, segment: range) -> str:
        return f"{self._place}/{segment.start:06d}-{segment.stop:06d}.npz"


def pack_takes(chunks: Sequence[SpokenChunk]) -> bytes:
    """The takes of a whole script, and where their chunks begin and end in it."""
    facts = {"sample_rate_hz": chunks[0].sample_rate_hz if chunks else 0}
    places = {"places": [[chunk.start_sample, chunk.stop_sample] for chunk in chunks]}
    return _pack([chunk.take for chunk in chunks], facts | places)


def unpack_takes(content: bytes) -> list[Take]:
    """The takes of a file; ValueError or KeyError if it is none."""
    return _unpack(*_open(content))


def unpack_recording(content: bytes) -> KeptRecording:
    """What `pack_takes` has kept of a script; ValueError or KeyError if it is none."""
    facts, codes_KT = _open(content)
    takes = _unpack(facts, codes_KT)
    places = [(int(start), int(stop)) for start, stop in facts["places"]]
    if len(places) != len(takes):
        raise ValueError(f"{len(takes)} takes at {len(places)} places")
    return KeptRecording(tuple(takes), tuple(places), int(facts["sample_rate_hz"]))


@dataclasses.dataclass(frozen=True)
class KeptRecording:
    """The takes of a script, and the samples [start, stop) of the recording that each filled."""

    takes: tuple[Take, ...]
    places: tuple[tuple[int, int], ...]
    sample_rate_hz: int


def _open(content: bytes) -> tuple[dict[str, Any], Codes]:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return json.loads(file["facts"].tobytes()), file["codes"]


def _unpack(facts: dict[str, Any], codes_KT: Codes) -> list[Take]:
    takes, start = [], 0
    for fact in facts["takes"]:
        attempts = tuple(_attempt(one) for one in fact["attempts"])
        frames = attempts[fact["kept"]].frames
        takes.append(Take(fact["index"], codes_KT[:, start : start + frames], attempts, fact["kept"]))
        start += frames
    if start != codes_KT.shape[1]:
        raise ValueError(f"{codes_KT.shape[1]} frames for takes of {start}")
    return takes


def _pack(takes: Sequence[Take], more: dict[str, Any]) -> bytes:
    facts = [
        {"index": take.index, "kept": take.kept, "attempts": [dataclasses.asdict(one) for one in take.attempts]}
        for take in takes
    ]
    content = json.dumps({"takes": facts} | more).encode()
    file = io.BytesIO()
    np.savez_compressed(
        file,
        codes=np.concatenate([take.codes_KT for take in takes], axis=1),
        facts=np.frombuffer(content, np.uint8),
    )
    return file.getvalue()


def _attempt(fact: dict[str, Any]) -> Attempt:
    with contextlib.suppress(TypeError):
        return Attempt(**fact | {"faults": tuple(fact["faults"]), "notes": tuple(fact["notes"])})
    raise ValueError(f"an attempt with the facts {sorted(fact)}")
