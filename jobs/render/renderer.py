"""Renders a finished row in another audio format from its stored codes, with only the codec: no GPU, no language model.

In: a result row and its `codes/….npz`. Out: an audio file and its result row, with the same text, seeds and takes. If
the codes are missing or damaged, the result is a failed row.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import zipfile
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch

from higgs_model.audio.writers import AudioFormat, WrittenFile
from higgs_model.engine.codec_worker import CodecWorker
from higgs_model.errors import BadInput
from higgs_model.synthesizer.loading import load_codec
from higgs_model.synthesizer.records import SynthesizedChunk
from higgs_model.synthesizer.replay import replay
from higgs_model.synthesizer.settings import SynthesisSettings
from jobs.runtime.ray_cluster import THREADS_PER_CPU_WORKER
from jobs.storage.audio_writer import open_recording_writer
from jobs.storage.backends import open_storage
from jobs.storage.code_archive import ArchivedRecording, unpack_recording
from jobs.storage.result_table import to_table
from jobs.synthesize.row_processing import RowFailure, audio_name, codes_name

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class RenderSettings:
    """Source, destination and audio format; see `jobs.render.cli` for the flags."""

    results: str
    output: str
    model: str
    codec: str | None
    format: AudioFormat
    sample_rate: int | None = None
    loudness_lufs: float | None = None
    true_peak_dbtp: float | None = None


class Renderer:
    """Renders rows with a codec that is loaded at the first row."""

    def __init__(self, settings: RenderSettings) -> None:
        self._settings = settings
        self._source, self._output = open_storage(settings.results), open_storage(settings.output)
        self._codec_worker: CodecWorker | None = None

    def render(self, row: Row) -> Row:
        """Render a row; return its new result row. Errors are returned as failed rows."""
        try:
            return asyncio.run(self._render(row))
        except RowFailure as error:
            error_type, message = error.error_type, str(error)
        except BadInput as error:
            error_type, message = "bad_input", str(error)
        except OSError as error:
            error_type, message = "storage", str(error)
        except Exception as error:
            logger.exception("row %s", row["id"])
            error_type, message = "internal", f"{type(error).__name__}: {error}"
        empty = dict.fromkeys(("audio_path", "duration_s", "sample_rate", "num_frames", "audio_sha256", "chunks"))
        return {**row, **empty, "status": "failed", "error_type": error_type, "error": message}

    def close(self) -> None:
        """Stop the codec's thread."""
        if self._codec_worker is not None:
            self._codec_worker.close()

    async def _render(self, row: Row) -> Row:
        archived = self._load_codes(row)
        chunks = [
            SynthesizedChunk(
                take.index, chunk["text"], tuple(chunk["speakers"]), *sample_range, archived.sample_rate_hz, take
            )
            for take, sample_range, chunk in zip(archived.takes, archived.sample_ranges, row["chunks"], strict=True)
        ]
        worker = self._get_worker(archived)
        name = audio_name(row["id"], self._settings.format)
        rendered: list[SynthesizedChunk] = []
        path = self._output.staging_path(name)
        with open_recording_writer(path, archived.sample_rate_hz, self._settings) as recording:
            num_samples = recording_length(archived, row["duration_s"])
            async for piece in replay(chunks, num_samples, worker, SynthesisSettings()):
                if len(piece.samples_N):
                    recording.write(piece.samples_N)
                if piece.chunk is not None:
                    rendered.append(piece.chunk)
            written = recording.finish()
        self._output.publish(written.path, name)
        return self._result(row, name, written, rendered)

    def _load_codes(self, row: Row) -> ArchivedRecording:
        name = codes_name(row["id"])
        try:
            archived = unpack_recording(self._source.read(name))
        except FileNotFoundError:
            where = self._source.locate(name)
            raise RowFailure("no_codes", f"{where} does not exist; run the job with --keep-codes") from None
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise RowFailure("no_codes", f"{self._source.locate(name)} contains no readable codes: {error}") from error
        if [take.index for take in archived.takes] != [chunk["index"] for chunk in row["chunks"]]:
            raise RowFailure(
                "no_codes", f"{self._source.locate(name)} has other chunks than the result: it is from another run"
            )
        return archived

    def _get_worker(self, archived: ArchivedRecording) -> CodecWorker:
        if self._codec_worker is None:
            codec = load_codec(self._settings.model, self._settings.codec, torch.device("cpu"))
            self._codec_worker = CodecWorker(codec)
        codec = self._codec_worker.codec
        num_codebooks = archived.takes[0].codes_KT.shape[0]
        if (codec.sample_rate, codec.num_codebooks) != (archived.sample_rate_hz, num_codebooks):
            raise RowFailure(
                "no_codes",
                f"the codes have {num_codebooks} codebooks at {archived.sample_rate_hz} Hz, but the codec has "
                f"{codec.num_codebooks} at {codec.sample_rate} Hz; pass the codec of the job with --codec",
            )
        return self._codec_worker

    def _result(self, row: Row, name: str, written: WrittenFile, rendered_chunks: list[SynthesizedChunk]) -> Row:
        chunks = [
            {**chunk, "start_s": rendered.start_s, "end_s": rendered.end_s}
            for chunk, rendered in zip(row["chunks"], rendered_chunks, strict=True)
        ]
        return {
            **row,
            "audio_path": self._output.locate(name),
            "duration_s": written.duration_s,
            "sample_rate": written.sample_rate_hz,
            "audio_sha256": written.sha256,
            "chunks": chunks,
        }


class BatchRenderer:
    """A callable class for Ray Data's actor pool: result rows in, as many result rows out."""

    def __init__(self, settings: RenderSettings) -> None:
        torch.set_num_threads(THREADS_PER_CPU_WORKER)
        self._renderer = Renderer(settings)

    def __call__(self, table: pa.Table) -> pa.Table:
        return to_table([self._renderer.render(row) for row in table.to_pylist()], table.schema)


def recording_length(archived: ArchivedRecording, duration_s: float) -> int:
    """Return the length of the original recording in samples at the codec's sample rate.

    The pause after the last chunk is a whole number of milliseconds, so the exact length follows from the duration of
    the original file, whatever its sample rate was.
    """
    stop_sample = archived.sample_ranges[-1][1]
    tail_ms = round((duration_s - stop_sample / archived.sample_rate_hz) * 1000)
    return stop_sample + max(tail_ms, 0) * archived.sample_rate_hz // 1000
