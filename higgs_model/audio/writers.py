"""Atomic, streaming writers of audio files.

In: mono float samples in blocks of any size. Out: a WAV, FLAC, MP3 or Opus file, and a record of it. The file appears
under its name only when it is complete and synced to disk; a failure before that leaves nothing behind. The same
samples yield the same bytes, whatever the block sizes (with one build of libsndfile). WAV and FLAC hold 16-bit samples,
exactly as many as were written; MP3 and Opus add a few milliseconds of encoder padding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from higgs_model.errors import BadInput

Samples = NDArray[np.float32]
AudioFormat = Literal["wav", "flac", "mp3", "opus"]
FORMATS: tuple[AudioFormat, ...] = ("wav", "flac", "mp3", "opus")

_RATES_HZ = {
    "mp3": (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000),
    "opus": (8000, 12000, 16000, 24000, 48000),
}
_MPEG_1_FROM_HZ = 32000
_MAX_WAV_BYTES = 2**32 - 2**16
"""Limit of the 32-bit sizes in a WAV header."""


@dataclasses.dataclass(frozen=True)
class WrittenFile:
    """A finished file. `num_samples` excludes encoder padding."""

    path: Path
    sha256: str
    num_bytes: int
    num_samples: int
    sample_rate_hz: int

    @property
    def duration_s(self) -> float:
        return self.num_samples / self.sample_rate_hz


class AudioWriter:
    """Writes one file. As a context manager, it leaves nothing behind if the block raises.

    Args:
        path: the final path; its folder must exist.
        file_format: container and codec.
        sample_rate_hz: sample rate of the samples to write.
        output_rate_hz: sample rate of the file, to which samples are resampled; None: the same.

    Raises:
        BadInput: the format does not support the sample rate.
    """

    def __init__(
        self, path: str | Path, file_format: AudioFormat, sample_rate_hz: int, output_rate_hz: int | None = None
    ) -> None:
        self._path, self._format = Path(path), file_format
        self._rate_hz = output_rate_hz or sample_rate_hz
        check_sample_rate(file_format, self._rate_hz)
        self._resampler = (
            None if self._rate_hz == sample_rate_hz else soxr.ResampleStream(sample_rate_hz, self._rate_hz, 1)
        )
        self._num_samples, self._finished = 0, False
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name[:100]}.", suffix=".part")
        self._temporary_path, self._raw = Path(name), os.fdopen(handle, "r+b", buffering=0)
        self._file = soundfile.SoundFile(
            handle, "w", self._rate_hz, 1, closefd=False, **libsndfile_options(file_format, self._rate_hz)
        )

    def write(self, samples_N: Samples) -> None:
        """Append samples; values beyond full scale are clipped.

        Raises:
            BadInput: the file would exceed the size limit of its format.
        """
        self._append(samples_N if self._resampler is None else self._resampler.resample_chunk(samples_N))

    def finish(self) -> WrittenFile:
        """Close the file and move it to its final path.

        Raises:
            BadInput: no samples were written; not every format supports an empty file.
        """
        if self._resampler is not None:
            self._append(self._resampler.resample_chunk(np.empty(0, np.float32), last=True))
        if self._num_samples == 0:
            raise BadInput(f"{self._path.name}: no samples to write")
        self._file.close()
        with self._raw as file:
            if self._format == "opus":
                file.seek(0)
                reset_ogg_serial(file)
            file.seek(0)
            sha256, num_bytes = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(self._temporary_path, self._path)
        self._finished = True
        return WrittenFile(self._path, sha256, num_bytes, self._num_samples, self._rate_hz)

    def discard(self) -> None:
        """Delete the temporary file. Does nothing after `finish`."""
        if not self._finished:
            self._file.close()
            self._raw.close()
            self._temporary_path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.discard()

    def _append(self, samples_N: Samples) -> None:
        self._num_samples += len(samples_N)
        if self._format == "wav" and 2 * self._num_samples > _MAX_WAV_BYTES:
            hours = _MAX_WAV_BYTES / 2 / self._rate_hz / 3600
            raise BadInput(f"a WAV file cannot hold more than {hours:.1f} h at {self._rate_hz} Hz; use flac")
        self._file.write(to_pcm16(samples_N))


def check_sample_rate(file_format: str, sample_rate_hz: int) -> None:
    """Raise `BadInput` if a format does not support a sample rate."""
    rates = _RATES_HZ.get(file_format)
    if rates is not None and sample_rate_hz not in rates:
        raise BadInput(
            f"{file_format} does not support {sample_rate_hz} Hz, only {', '.join(map(str, rates))} Hz; "
            "wav and flac support any rate"
        )


def to_pcm16(samples_N: Samples) -> NDArray[np.int16]:
    """Convert to 16-bit samples, rounded to nearest and clipped at full scale."""
    return np.clip(np.rint(samples_N * np.float32(32768)), -32768, 32767).astype(np.int16)


def libsndfile_options(file_format: AudioFormat, rate_hz: int) -> dict[str, Any]:
    """Return the arguments of `soundfile.SoundFile` for a format."""
    if file_format == "mp3":
        # libsndfile maps 0 … 1 to the highest … lowest bit rate: 192 of 320 kbit/s, or 128 of 160 at low sample rates.
        level = 0.4 if rate_hz >= _MPEG_1_FROM_HZ else 0.2
        return {
            "format": "MP3",
            "subtype": "MPEG_LAYER_III",
            "bitrate_mode": "CONSTANT",
            "compression_level": level,
        }
    return {
        "wav": {"format": "WAV", "subtype": "PCM_16"},
        "flac": {"format": "FLAC", "subtype": "PCM_16"},
        "opus": {"format": "OGG", "subtype": "OPUS"},
    }[file_format]


# libsndfile assigns a random serial number to every Ogg stream. Our files hold a single stream, and the same samples
# should yield the same bytes, so the number is reset to 0.

_BIT_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_HEADER_BYTES, _SERIAL_OFFSET, _CRC_OFFSET, _SEGMENTS_OFFSET = 27, 14, 22, 26


def reset_ogg_serial(file: BinaryIO) -> None:
    """Set the serial number of an Ogg file's stream to 0, page by page (RFC 3533)."""
    while len(header := file.read(_HEADER_BYTES)) == _HEADER_BYTES:
        segments = file.read(header[_SEGMENTS_OFFSET])
        page = bytearray(header + segments + file.read(sum(segments)))
        page[_SERIAL_OFFSET : _SERIAL_OFFSET + 4] = page[_CRC_OFFSET : _CRC_OFFSET + 4] = bytes(4)
        page[_CRC_OFFSET : _CRC_OFFSET + 4] = _ogg_crc(page).to_bytes(4, "little")
        file.seek(-len(page), os.SEEK_CUR)
        file.write(page)
        file.flush()


def _ogg_crc(page: bytearray) -> int:
    """Return the Ogg checksum: zlib's CRC-32 with reversed bit order and without the two inversions."""
    reflected = zlib.crc32(page.translate(_BIT_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)
