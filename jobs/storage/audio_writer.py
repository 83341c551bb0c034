"""Writes a recording to an audio file, optionally with a constant gain that is known only at the end.

In: mono float samples in blocks of any size, and the settings of the file. Out: a complete file, or none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from higgs_model.audio.loudness import LoudnessMeter, TruePeakMeter, constant_gain_db
from higgs_model.audio.writers import AudioFormat, AudioWriter, WrittenFile
from higgs_model.synthesizer.records import Samples

_BLOCK_SAMPLES = 1 << 18
"""Samples per read or write."""


class AudioFileSettings(Protocol):
    """Settings of audio files; None means the codec's sample rate (Hz), no loudness normalization, or no peak limit."""

    @property
    def format(self) -> AudioFormat: ...
    @property
    def sample_rate(self) -> int | None: ...
    @property
    def loudness_lufs(self) -> float | None: ...
    @property
    def true_peak_dbtp(self) -> float | None: ...


def open_recording_writer(path: Path, sample_rate_hz: int, settings: AudioFileSettings) -> RecordingWriter:
    """Open an audio file for writing.

    Raises:
        BadInput: its format does not support its sample rate.
    """
    writer = AudioWriter(path, settings.format, sample_rate_hz, settings.sample_rate)
    if settings.loudness_lufs is None and settings.true_peak_dbtp is None:
        return RecordingWriter(writer)
    return NormalizedRecordingWriter(writer, sample_rate_hz, settings.loudness_lufs, settings.true_peak_dbtp)


class BufferedRecording:
    """Buffers about ten seconds of samples, so that a short recording takes a single call to a writer thread.

    Args:
        open_writer: opens the file at the first flush.
    """

    def __init__(self, open_writer: Callable[[], RecordingWriter]) -> None:
        self._open_writer = open_writer
        self._writer: RecordingWriter | None = None
        self._buffer: list[Samples] = []
        self._num_buffered = 0

    def __enter__(self) -> BufferedRecording:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.__exit__()

    def append(self, samples_N: Samples) -> bool:
        """Buffer samples; return whether the buffer should be flushed."""
        self._buffer.append(samples_N)
        self._num_buffered += len(samples_N)
        return self._num_buffered >= _BLOCK_SAMPLES

    def flush(self) -> RecordingWriter:
        """Write the buffered samples and return the file's writer. Blocks.

        Raises:
            BadInput: the format does not support the sample rate, or a recording of this length.
        """
        if self._writer is None:
            self._writer = self._open_writer()
        for samples_N in self._buffer:
            self._writer.write(samples_N)
        self._buffer, self._num_buffered = [], 0
        return self._writer

    def finish(self) -> WrittenFile:
        """Flush, close the file and rename it into place. Blocks."""
        return self.flush().finish()


class RecordingWriter:
    """Writes samples directly to an audio file."""

    def __init__(self, writer: AudioWriter) -> None:
        self._writer = writer

    def __enter__(self) -> RecordingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.discard()

    def write(self, samples_N: Samples) -> None:
        """Append samples."""
        self._writer.write(samples_N)

    def finish(self) -> WrittenFile:
        """Close the file and rename it into place."""
        return self._writer.finish()


class NormalizedRecordingWriter(RecordingWriter):
    """Normalizes with a constant gain that is known only at the end; until then, samples are spooled to disk."""

    def __init__(
        self, writer: AudioWriter, sample_rate_hz: int, target_lufs: float | None, limit_dbtp: float | None
    ) -> None:
        super().__init__(writer)
        self._target, self._limit = target_lufs, limit_dbtp
        self._loudness, self._peak = LoudnessMeter(sample_rate_hz), TruePeakMeter()
        self._spool = tempfile.TemporaryFile(prefix="higgs-")  # noqa: SIM115  (closed on exit)

    def __exit__(self, *_: object) -> None:
        self._spool.close()
        super().__exit__()

    def write(self, samples_N: Samples) -> None:
        self._loudness.add(samples_N)
        self._peak.add(samples_N)
        self._spool.write(samples_N.astype("<f4").tobytes())

    def finish(self) -> WrittenFile:
        gain_db = constant_gain_db(
            self._loudness.integrated_lufs, self._peak.dbtp, target_lufs=self._target, limit_dbtp=self._limit
        )
        self._spool.seek(0)
        while block := self._spool.read(4 * _BLOCK_SAMPLES):
            self._writer.write(np.frombuffer(block, "<f4") * np.float32(10 ** (gain_db / 20)))
        return super().finish()
