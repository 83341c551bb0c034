"""Audio files, written as the samples come: whole or not there.

In: mono float samples in any portions. Out: a WAV, FLAC, MP3 or Opus file, and a record of it. The file gets its name
only when it is finished and on the disk; whatever goes wrong before leaves nothing. The same samples give the same
bytes, however they were cut into portions (with one build of libsndfile). WAV and FLAC hold 16-bit samples, as many as
were written; MP3 and Opus add the few milliseconds of their encoders.
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
_WAV_BYTES = 2**32 - 2**16
"""What the sizes in a WAV file's header can say."""


@dataclasses.dataclass(frozen=True)
class WrittenFile:
    """A finished file; `num_samples` of sound, encoders' padding not counted."""

    path: Path
    sha256: str
    num_bytes: int
    num_samples: int
    sample_rate_hz: int

    @property
    def duration_s(self) -> float:
        return self.num_samples / self.sample_rate_hz


class AudioWriter:
    """One file under way; a context manager that leaves nothing behind when it is left by an exception.

    Args:
        path: where the file will be; its folder is there.
        sample_rate_hz: of the samples that come.
        output_rate_hz: of the file, if it is to be another.

    Raises:
        BadInput: the format cannot hold that rate.
    """

    def __init__(
        self, path: str | Path, file_format: AudioFormat, sample_rate_hz: int, output_rate_hz: int | None = None
    ) -> None:
        self._path, self._format = Path(path), file_format
        self._rate_hz = output_rate_hz or sample_rate_hz
        check_rate(file_format, self._rate_hz)
        self._resampler = (
            None if self._rate_hz == sample_rate_hz else soxr.ResampleStream(sample_rate_hz, self._rate_hz, 1)
        )
        self._num_samples, self._finished = 0, False
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name[:100]}.", suffix=".part")
        self._part, self._raw = Path(name), os.fdopen(handle, "r+b", buffering=0)
        self._file = soundfile.SoundFile(
            handle, "w", self._rate_hz, 1, closefd=False, **encoding(file_format, self._rate_hz)
        )

    def write(self, samples_N: Samples) -> None:
        """Append samples; what is beyond full scale is clipped.

        Raises:
            BadInput: the file would grow beyond what its format can say.
        """
        self._append(samples_N if self._resampler is None else self._resampler.resample_chunk(samples_N))

    def finish(self) -> WrittenFile:
        """Close the file and give it its name.

        Raises:
            BadInput: there was not one sample; not every format can hold nothing.
        """
        if self._resampler is not None:
            self._append(self._resampler.resample_chunk(np.empty(0, np.float32), last=True))
        if self._num_samples == 0:
            raise BadInput(f"{self._path.name}: there is no sample to be written")
        self._file.close()
        with self._raw as file:
            if self._format == "opus":
                file.seek(0)
                renumber_ogg(file)
            file.seek(0)
            sha256, num_bytes = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(self._part, self._path)
        self._finished = True
        return WrittenFile(self._path, sha256, num_bytes, self._num_samples, self._rate_hz)

    def discard(self) -> None:
        """Leave nothing behind. After `finish` it does nothing."""
        if not self._finished:
            self._file.close()
            self._raw.close()
            self._part.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.discard()

    def _append(self, samples_N: Samples) -> None:
        self._num_samples += len(samples_N)
        if self._format == "wav" and 2 * self._num_samples > _WAV_BYTES:
            hours = _WAV_BYTES / 2 / self._rate_hz / 3600
            raise BadInput(f"a WAV file cannot hold more than {hours:.1f} h at {self._rate_hz} Hz; use flac")
        self._file.write(to_pcm16(samples_N))


def check_rate(file_format: str, sample_rate_hz: int) -> None:
    """Raise `BadInput` if a format cannot hold a sample rate."""
    rates = _RATES_HZ.get(file_format)
    if rates is not None and sample_rate_hz not in rates:
        raise BadInput(
            f"{file_format} cannot hold {sample_rate_hz} Hz; it knows {', '.join(map(str, rates))} Hz, wav and flac any"
        )


def to_pcm16(samples_N: Samples) -> NDArray[np.int16]:
    """16-bit samples, rounded to the nearest and clipped at full scale."""
    return np.clip(np.rint(samples_N * np.float32(32768)), -32768, 32767).astype(np.int16)


def encoding(file_format: AudioFormat, rate_hz: int) -> dict[str, Any]:
    """What libsndfile is told of a format."""
    if file_format == "mp3":
        # libsndfile maps 0 … 1 to the highest … lowest rate: 192 of 320 kbit/s, or 128 of 160 at the lower rates.
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


# Ogg gives every stream a random number, so that streams can be told apart when several are in one file. Here there is
# one, and the same sound should be the same file.

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_HEADER_BYTES, _SERIAL_AT, _CRC_AT, _SEGMENTS_AT = 27, 14, 22, 26


def renumber_ogg(file: BinaryIO) -> None:
    """Give the stream of an Ogg file the number 0, page by page (RFC 3533)."""
    while len(header := file.read(_HEADER_BYTES)) == _HEADER_BYTES:
        table = file.read(header[_SEGMENTS_AT])
        page = bytearray(header + table + file.read(sum(table)))
        page[_SERIAL_AT : _SERIAL_AT + 4] = page[_CRC_AT : _CRC_AT + 4] = bytes(4)
        page[_CRC_AT : _CRC_AT + 4] = _ogg_crc(page).to_bytes(4, "little")
        file.seek(-len(page), os.SEEK_CUR)
        file.write(page)
        file.flush()


def _ogg_crc(page: bytearray) -> int:
    """Ogg's checksum: zlib's polynomial with the bits the other way round, and without its two inversions."""
    reflected = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)
