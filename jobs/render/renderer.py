"""One finished row in another format, from the codes that its job has kept: codec only, no GPU, no language model.

In: a result row and its `codes/….npz`. Out: an audio file and the row that belongs to it, with the same text, seeds and
takes. A row whose codes are missing or damaged becomes a row that says so.
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
from higgs_model.synthesizer.records import SpokenChunk
from higgs_model.synthesizer.replay import replay
from higgs_model.synthesizer.settings import SynthesisSettings
from jobs.runtime.ray_cluster import THREADS_A_CPU_WORKER
from jobs.storage.audio_writer import open_recording
from jobs.storage.backends import open_folder
from jobs.storage.code_archive import KeptRecording, unpack_recording
from jobs.storage.result_table import table_of
from jobs.synthesize.row_processing import BadRow, audio_name, codes_name

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class RenderSettings:
    """What is made, and from what; see `jobs.render` for the flags."""

    results: str
    output: str
    model: str
    codec: str | None
    format: AudioFormat
    sample_rate: int | None = None
    loudness_lufs: float | None = None
    true_peak_dbtp: float | None = None


class Renderer:
    """Renders rows, with a codec of its own; loaded when the first row needs it."""

    def __init__(self, settings: RenderSettings) -> None:
        self._settings = settings
        self._source, self._output = open_folder(settings.results), open_folder(settings.output)
        self._loaded: CodecWorker | None = None

    def render(self, row: Row) -> Row:
        """The row that belongs to the new file, whatever happens."""
        try:
            return asyncio.run(self._render(row))
        except BadRow as fault:
            kind, message = fault.kind, str(fault)
        except BadInput as error:
            kind, message = "bad_input", str(error)
        except OSError as error:
            kind, message = "storage", str(error)
        except Exception as error:
            logger.exception("row %s", row["id"])
            kind, message = "internal", f"{type(error).__name__}: {error}"
        gone = dict.fromkeys(("audio_path", "duration_s", "sample_rate", "num_frames", "audio_sha256", "chunks"))
        return {**row, **gone, "status": "failed", "error_type": kind, "error": message}

    def close(self) -> None:
        """Stop the codec's thread."""
        if self._loaded is not None:
            self._loaded.close()

    async def _render(self, row: Row) -> Row:
        kept = self._kept(row)
        chunks = [
            SpokenChunk(take.index, chunk["text"], tuple(chunk["speakers"]), *place, kept.sample_rate_hz, take)
            for take, place, chunk in zip(kept.takes, kept.places, row["chunks"], strict=True)
        ]
        worker = self._worker(kept)
        name = audio_name(row["id"], self._settings.format)
        made: list[SpokenChunk] = []
        with open_recording(self._output.draft(name), kept.sample_rate_hz, self._settings) as recording:
            num_samples = whole_length(kept, row["duration_s"])
            async for piece in replay(chunks, num_samples, worker, SynthesisSettings()):
                if len(piece.samples_N):
                    recording.write(piece.samples_N)
                if piece.chunk is not None:
                    made.append(piece.chunk)
            written = recording.finish()
        self._output.publish(written.path, name)
        return self._result(row, name, written, made)

    def _kept(self, row: Row) -> KeptRecording:
        name = codes_name(row["id"])
        try:
            kept = unpack_recording(self._source.get(name))
        except FileNotFoundError:
            where = self._source.locate(name)
            raise BadRow("no_codes", f"{where} is not there; codes are kept by a job with --keep-codes") from None
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise BadRow("no_codes", f"{self._source.locate(name)} holds no codes that can be read: {error}") from error
        if [take.index for take in kept.takes] != [chunk["index"] for chunk in row["chunks"]]:
            raise BadRow(
                "no_codes", f"{self._source.locate(name)} holds other chunks than the result: it is of another run"
            )
        return kept

    def _worker(self, kept: KeptRecording) -> CodecWorker:
        if self._loaded is None:
            codec = load_codec(self._settings.model, self._settings.codec, torch.device("cpu"))
            self._loaded = CodecWorker(codec)
        codec = self._loaded.codec
        books = kept.takes[0].codes_KT.shape[0]
        if (codec.sample_rate, codec.num_codebooks) != (kept.sample_rate_hz, books):
            raise BadRow(
                "no_codes",
                f"the codes have {books} codebooks for {kept.sample_rate_hz} Hz, the codec has {codec.num_codebooks} "
                f"for {codec.sample_rate} Hz: name the codec that made them with --codec",
            )
        return self._loaded

    def _result(self, row: Row, name: str, written: WrittenFile, made: list[SpokenChunk]) -> Row:
        chunks = [
            {**chunk, "start_s": spoken.start_s, "end_s": spoken.end_s}
            for chunk, spoken in zip(row["chunks"], made, strict=True)
        ]
        return {
            **row,
            "audio_path": self._output.locate(name),
            "duration_s": written.duration_s,
            "sample_rate": written.sample_rate_hz,
            "audio_sha256": written.sha256,
            "chunks": chunks,
        }


class RenderBatch:
    """What Ray Data calls, in processes of its own: a few rows in, as many out."""

    def __init__(self, settings: RenderSettings) -> None:
        torch.set_num_threads(THREADS_A_CPU_WORKER)
        self._renderer = Renderer(settings)

    def __call__(self, table: pa.Table) -> pa.Table:
        return table_of([self._renderer.render(row) for row in table.to_pylist()], table.schema)


def whole_length(kept: KeptRecording, duration_s: float) -> int:
    """Samples of the recording that the codes were kept of, at the codec's rate.

    What comes after its last chunk is a pause of whole milliseconds, so that its length follows from the file's
    duration at whatever rate that was written.
    """
    last = kept.places[-1][1]
    tail_ms = round((duration_s - last / kept.sample_rate_hz) * 1000)
    return last + max(tail_ms, 0) * kept.sample_rate_hz // 1000
