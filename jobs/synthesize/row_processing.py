"""Processes one row: validates it, synthesizes it, writes its audio file, and returns its result row.

Successful and failed rows have the same columns. The audio file is complete before the result row is returned, so the
file of every stored result exists. Does not depend on Ray.
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
from higgs_model.script.script import Script, error_messages
from higgs_model.script.spoken_forms import Lexicon
from higgs_model.synthesizer.records import Piece, SynthesizedChunk
from jobs.storage.audio_writer import BufferedRecording, RecordingWriter, open_recording_writer
from jobs.storage.backends import open_storage
from jobs.storage.code_archive import SegmentArchive, pack_takes
from jobs.storage.manifest import PARSE_ERROR, Row
from jobs.storage.uris import open_voices, parent_folder, read_bytes
from jobs.synthesize.settings import JobSettings

if TYPE_CHECKING:
    from higgs_model.synthesizer.synthesizer import SegmentStore
Result = TypeVar("Result")


class SynthesizerProtocol(Protocol):
    """The interface of `Synthesizer` that a job uses."""

    @property
    def sample_rate(self) -> int:
        """Sample rate in Hz."""

    def stream(self, plan: Plan, *, segment_store: SegmentStore | None = None) -> AsyncGenerator[Piece]:
        """Yield a plan's recording piece by piece."""

    def metrics(self) -> dict[str, float]:
        """Return the engine's metrics."""

    def close(self) -> None:
        """Release all resources."""


class RowFailure(Exception):
    """A row cannot be synthesized; `error_type` is the category in the results."""

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(message)
        self.error_type = error_type


@dataclasses.dataclass(frozen=True)
class ValidatedRow:
    """A row that passed validation; `sha256` covers everything that determines its audio."""

    script: Script
    plan: Plan
    sha256: str


class RowProcessor:
    """Processes the rows of one job."""

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._output = open_storage(settings.output)
        self._writers = ThreadPoolExecutor(self._output.num_writers, thread_name_prefix="files")
        self._voices = open_voices(settings.voices, parent_folder(settings.manifest))
        self._lexicon = open_lexicon(settings.lexicon)
        self._defaults = {"seed": settings.seed} | settings.row_defaults()
        self._audio_settings = settings.audio_settings()

    def validate(self, row: Row) -> ValidatedRow:
        """Validate a row, look up its voices and split its text.

        Raises:
            RowFailure: it cannot be synthesized.
        """
        if PARSE_ERROR in row:
            raise RowFailure("invalid_row", str(row[PARSE_ERROR]))
        try:
            script = Script.model_validate(row).with_defaults(self._defaults)
        except ValidationError as error:
            raise RowFailure("invalid_row", "; ".join(error_messages(error))) from None
        try:
            plan = Plan.from_script(script, self._voices, self._lexicon)
            digest = script.content_hash(self._voices, self._lexicon)
        except HiggsError as error:
            raise RowFailure("bad_input", str(error)) from error
        return ValidatedRow(script, plan, self._digest(digest))

    def _digest(self, content: str) -> str:
        """Return the hash of a script combined with the job settings that affect its audio."""
        return hashlib.sha256(json.dumps([content, self._audio_settings], sort_keys=True).encode()).hexdigest()

    async def synthesize(self, synthesizer: SynthesizerProtocol, row: Row, valid: ValidatedRow) -> Mapping[str, Any]:
        """Synthesize a row, write its files, and return its result row.

        Raises:
            RowFailure: no take has any audio.
            OSError: a file could not be written.
        """
        start_s = time.perf_counter()
        name = audio_name(valid.script.id, self._settings.format)
        segments = SegmentArchive(self._output, valid.script.id, valid.sha256)
        segment_store = segments if self._settings.segment_minutes is not None else None
        chunks: list[SynthesizedChunk] = []
        with BufferedRecording(functools.partial(self._open_writer, name, synthesizer.sample_rate)) as recording:
            async with contextlib.aclosing(synthesizer.stream(valid.plan, segment_store=segment_store)) as pieces:
                async for piece in pieces:
                    if recording.append(piece.samples_N):
                        await self._in_writer_thread(recording.flush)
                    if piece.chunk is not None:
                        chunks.append(piece.chunk)
            if not any(chunk.stop_sample > chunk.start_sample for chunk in chunks):
                raise RowFailure("no_audio", f"no take of the {len(chunks)} chunks has any audio")
            written = await self._in_writer_thread(self._publish, recording, name, valid, chunks)
        if segment_store is not None:
            await self._in_writer_thread(segments.delete)
        return self._result(row, valid, written, chunks, time.perf_counter() - start_s)

    async def _in_writer_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._writers, work, *arguments)

    def _publish(
        self, recording: BufferedRecording, name: str, valid: ValidatedRow, chunks: list[SynthesizedChunk]
    ) -> WrittenFile:
        written = recording.finish()
        if self._settings.keep_codes:
            self._output.write(codes_name(valid.script.id), pack_takes(chunks))
        self._output.publish(written.path, name)
        return written

    def failed_result(self, row: Row, error: RowFailure, valid: ValidatedRow | None = None) -> Mapping[str, Any]:
        """Return the result row of a row without audio."""
        row_id = row.get("id")
        return row | {
            "id": row_id if isinstance(row_id, str) else None if row_id is None else str(row_id),
            "status": "failed",
            "error_type": error.error_type,
            "error": str(error),
            "model": self._settings.model,
            "script_sha256": valid.sha256 if valid else None,
            "seed": valid.script.seed if valid else row.get("seed"),
        }

    def _result(
        self, row: Row, valid: ValidatedRow, written: WrittenFile, chunks: list[SynthesizedChunk], synthesis_s: float
    ) -> Mapping[str, Any]:
        name = audio_name(valid.script.id, self._settings.format)
        return row | {
            "id": valid.script.id,
            "status": "ok" if all(chunk.take.passed_checks for chunk in chunks) else "flagged",
            "audio_path": self._output.locate(name),
            "duration_s": written.duration_s,
            "sample_rate": written.sample_rate_hz,
            "num_frames": sum(chunk.take.attempt.frames for chunk in chunks),
            "chunks": [_chunk_row(chunk) for chunk in chunks],
            "warnings": list(valid.plan.warnings),
            "audio_sha256": written.sha256,
            "script_sha256": valid.sha256,
            "model": self._settings.model,
            "seed": valid.script.seed,
            "synthesis_s": synthesis_s,
        }

    def _open_writer(self, name: str, sample_rate_hz: int) -> RecordingWriter:
        return open_recording_writer(self._output.staging_path(name), sample_rate_hz, self._settings)


def open_lexicon(uri: str | None) -> Lexicon | None:
    """Read a lexicon by path or URI.

    Raises:
        BadInput: it cannot be read.
    """
    if uri is None:
        return None
    try:
        return Lexicon.parse(read_bytes(uri).decode("utf-8-sig"), uri)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the lexicon {uri!r} cannot be read: {error}") from error


def audio_name(row_id: str, file_format: str) -> str:
    """Return the name of a row's audio file; 256 subfolders keep folders small."""
    return f"audio/{_shard(row_id)}/{row_id}.{file_format}"


def codes_name(row_id: str) -> str:
    """Return the name of the file that stores a row's codes (`--keep-codes`)."""
    return f"codes/{_shard(row_id)}/{row_id}.npz"


def _shard(row_id: str) -> str:
    return hashlib.sha256(row_id.encode()).hexdigest()[:2]


def _chunk_row(chunk: SynthesizedChunk) -> dict[str, Any]:
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
