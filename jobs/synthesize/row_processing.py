"""One row, from its mapping to its result: checked, spoken, written.

The result of a made row and of a failed one have the same columns. The audio file comes first and the result row last,
so that whoever reads a result finds its file. Nothing here knows Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import ValidationError

from higgs_model.audio.writers import WrittenFile
from higgs_model.errors import BadInput, HiggsError
from higgs_model.script.plan import Plan
from higgs_model.script.script import Script, faults
from higgs_model.script.spoken import Lexicon
from higgs_model.synthesizer.records import Piece, SpokenChunk
from jobs.storage.audio_writer import Gathered, Recording, open_recording
from jobs.storage.backends import open_folder
from jobs.storage.code_archive import KeptSegments, pack_takes
from jobs.storage.manifest import BROKEN, Row
from jobs.storage.uris import folder_of, open_voices, read_bytes
from jobs.synthesize.settings import JobSettings

if TYPE_CHECKING:
    from higgs_model.synthesizer.synthesizer import SegmentStore
Result = TypeVar("Result")


class Speaks(Protocol):
    """What is asked of a `Synthesizer`, or of something that stands for one."""

    @property
    def sample_rate(self) -> int:
        """Hz."""

    def speak(self, plan: Plan, *, kept: SegmentStore | None = None) -> AsyncGenerator[Piece]:
        """The recording, piece by piece."""

    def numbers(self) -> dict[str, float]:
        """What its engine has done."""

    def close(self) -> None:
        """Let go of everything."""


class BadRow(Exception):
    """A row that has no audio: the kind of its fault, and what it is in words."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Checked:
    """A row that can be spoken, as far as can be seen; the hash covers all that its audio follows from."""

    script: Script
    plan: Plan
    sha256: str


class RowMaker:
    """Makes rows for one job."""

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._folder = open_folder(settings.output)
        self._writers = ThreadPoolExecutor(self._folder.writers, thread_name_prefix="files")
        self._voices = open_voices(settings.voices, folder_of(settings.manifest))
        self._lexicon = open_lexicon(settings.lexicon)
        self._defaults = {"seed": settings.seed} | settings.row_defaults()
        self._heard = settings.audio_settings()

    def check(self, row: Row) -> Checked:
        """Validate a row, find its voices and cut its text.

        Raises:
            BadRow: it cannot be spoken.
        """
        if BROKEN in row:
            raise BadRow("invalid_row", str(row[BROKEN]))
        try:
            script = Script.model_validate(row).with_defaults(self._defaults)
        except ValidationError as error:
            raise BadRow("invalid_row", "; ".join(faults(error))) from None
        try:
            plan = Plan.of(script, self._voices, self._lexicon)
            digest = script.content_hash(self._voices, self._lexicon)
        except HiggsError as error:
            raise BadRow("bad_input", str(error)) from error
        return Checked(script, plan, self._digest(digest))

    def _digest(self, content: str) -> str:
        """A script's hash and all of the job's settings that are heard."""
        return hashlib.sha256(json.dumps([content, self._heard], sort_keys=True).encode()).hexdigest()

    async def make(self, speaks: Speaks, row: Row, checked: Checked) -> Mapping[str, Any]:
        """Speak a row and write its file."""
        start = time.perf_counter()
        name = audio_name(checked.script.id, self._settings.format)
        kept = KeptSegments(self._folder, checked.script.id, checked.sha256)
        stored = kept if self._settings.segment_minutes is not None else None
        chunks: list[SpokenChunk] = []
        with Gathered(functools.partial(self._recording, name, speaks.sample_rate)) as recording:
            async with contextlib.aclosing(speaks.speak(checked.plan, kept=stored)) as pieces:
                async for piece in pieces:
                    if recording.add(piece.samples_N):
                        await self._writing(recording.write)
                    if piece.chunk is not None:
                        chunks.append(piece.chunk)
            if not any(chunk.stop_sample > chunk.start_sample for chunk in chunks):
                raise BadRow("no_audio", f"none of the {len(chunks)} chunks gave any audio, in no attempt")
            written = await self._writing(self._publish, recording, name, checked, chunks)
        if stored is not None:
            await self._writing(kept.forget)
        return self._result(row, checked, written, chunks, time.perf_counter() - start)

    async def _writing(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._writers, work, *arguments)

    def _publish(self, recording: Gathered, name: str, checked: Checked, chunks: list[SpokenChunk]) -> WrittenFile:
        written = recording.finish()
        if self._settings.keep_codes:
            self._folder.put(codes_name(checked.script.id), pack_takes(chunks))
        self._folder.publish(written.path, name)
        return written

    def failed(self, row: Row, fault: BadRow, checked: Checked | None = None) -> Mapping[str, Any]:
        """The result of a row that has no audio."""
        identity = row.get("id")
        return row | {
            "id": identity if isinstance(identity, str) else None if identity is None else str(identity),
            "status": "failed",
            "error_type": fault.kind,
            "error": str(fault),
            "model": self._settings.model,
            "script_sha256": checked.sha256 if checked else None,
            "seed": checked.script.seed if checked else row.get("seed"),
        }

    def _result(
        self, row: Row, checked: Checked, written: WrittenFile, chunks: list[SpokenChunk], seconds: float
    ) -> Mapping[str, Any]:
        name = audio_name(checked.script.id, self._settings.format)
        return row | {
            "id": checked.script.id,
            "status": "ok" if all(chunk.take.good for chunk in chunks) else "flagged",
            "audio_path": self._folder.locate(name),
            "duration_s": written.duration_s,
            "sample_rate": written.sample_rate_hz,
            "num_frames": sum(chunk.take.attempt.frames for chunk in chunks),
            "chunks": [_chunk_row(chunk) for chunk in chunks],
            "warnings": list(checked.plan.warnings),
            "audio_sha256": written.sha256,
            "script_sha256": checked.sha256,
            "model": self._settings.model,
            "seed": checked.script.seed,
            "synthesis_s": seconds,
        }

    def _recording(self, name: str, sample_rate_hz: int) -> Recording:
        return open_recording(self._folder.draft(name), sample_rate_hz, self._settings)


def open_lexicon(uri: str | None) -> Lexicon | None:
    """A lexicon by path or URI.

    Raises:
        BadInput: it cannot be read.
    """
    if uri is None:
        return None
    try:
        return Lexicon.parse(read_bytes(uri).decode("utf-8-sig"), uri)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the lexicon {uri!r} cannot be read: {error}") from error


def audio_name(identity: str, file_format: str) -> str:
    """Where a row's audio is: in one of 256 folders, so that none holds too many."""
    return f"audio/{_shard(identity)}/{identity}.{file_format}"


def codes_name(identity: str) -> str:
    """Where a row's codes are, if they are kept."""
    return f"codes/{_shard(identity)}/{identity}.npz"


def _shard(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()[:2]


def _chunk_row(chunk: SpokenChunk) -> dict[str, Any]:
    attempt = chunk.take.attempt
    return {
        "index": chunk.index,
        "text": chunk.text,
        "speakers": list(chunk.speakers),
        "start_s": chunk.start_s,
        "end_s": chunk.end_s,
        "frames": attempt.frames,
        "seed": attempt.seed,
        "attempts": len(chunk.take.attempts),
        "finish_reason": attempt.finish_reason,
        "faults": list(attempt.faults),
    }
