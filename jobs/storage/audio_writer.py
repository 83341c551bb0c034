"""One recording on its way to its file: straight from the samples, or with the one gain that is known at its end.

In: mono float samples in any portions, and how they are to be delivered. Out: a whole file under its name, or none.
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

_BLOCK = 1 << 18
"""Samples that are written, or read back, at once."""


class Delivery(Protocol):
    """What the settings of a job say of its files; rates in Hz, None: as the codec has it, and as it comes."""

    @property
    def format(self) -> AudioFormat: ...
    @property
    def sample_rate(self) -> int | None: ...
    @property
    def loudness_lufs(self) -> float | None: ...
    @property
    def true_peak_dbtp(self) -> float | None: ...


def open_recording(path: Path, sample_rate_hz: int, delivery: Delivery) -> Recording:
    """Begin a file.

    Raises:
        BadInput: its format cannot hold its sample rate.
    """
    writer = AudioWriter(path, delivery.format, sample_rate_hz, delivery.sample_rate)
    if delivery.loudness_lufs is None and delivery.true_peak_dbtp is None:
        return Recording(writer)
    return MasteredRecording(writer, sample_rate_hz, delivery.loudness_lufs, delivery.true_peak_dbtp)


class Gathered:
    """Samples on their way to a file, some ten seconds at a time: a short recording is one piece of work.

    Args:
        begin: begins the file.
    """

    def __init__(self, begin: Callable[[], Recording]) -> None:
        self._begin = begin
        self._recording: Recording | None = None
        self._pieces: list[Samples] = []
        self._waiting = 0

    def __enter__(self) -> Gathered:
        return self

    def __exit__(self, *_: object) -> None:
        if self._recording is not None:
            self._recording.__exit__()

    def add(self, samples_N: Samples) -> bool:
        """Keep samples; says whether enough are together for `write`."""
        self._pieces.append(samples_N)
        self._waiting += len(samples_N)
        return self._waiting >= _BLOCK

    def write(self) -> Recording:
        """Put what is kept into the file; blocks. Gives the file.

        Raises:
            BadInput: the format cannot hold the sample rate, or no more samples.
        """
        if self._recording is None:
            self._recording = self._begin()
        for samples_N in self._pieces:
            self._recording.write(samples_N)
        self._pieces, self._waiting = [], 0
        return self._recording

    def finish(self) -> WrittenFile:
        """Write the rest, close the file and give it its name; blocks."""
        return self.write().finish()


class Recording:
    """A file under way, straight from the samples."""

    def __init__(self, writer: AudioWriter) -> None:
        self._writer = writer

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.discard()

    def write(self, samples_N: Samples) -> None:
        """Append samples."""
        self._writer.write(samples_N)

    def finish(self) -> WrittenFile:
        """Close the file and give it its name."""
        return self._writer.finish()


class MasteredRecording(Recording):
    """A file whose one gain is known only at the end: until then the samples lie beside it on the disk."""

    def __init__(
        self, writer: AudioWriter, sample_rate_hz: int, target_lufs: float | None, limit_dbtp: float | None
    ) -> None:
        super().__init__(writer)
        self._target, self._limit = target_lufs, limit_dbtp
        self._loudness, self._peak = LoudnessMeter(sample_rate_hz), TruePeakMeter()
        self._spool = tempfile.TemporaryFile(prefix="higgs-")  # noqa: SIM115  (closed on leaving)

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
        while block := self._spool.read(4 * _BLOCK):
            self._writer.write(np.frombuffer(block, "<f4") * np.float32(10 ** (gain_db / 20)))
        return super().finish()
