"""Streaming audio encoders: bytes that can be sent while samples are still being generated.

In: mono 16-bit samples in blocks of any size. Out: bytes of PCM, WAV, FLAC, MP3 or Opus that never change afterwards.
Header fields that depend on the total length use each format's convention for streams: the sizes in a WAV header are
0xFFFFFFFF, a FLAC declares an unknown number of samples, and an MP3 has no header, so that MP3 streams can simply be
concatenated.
"""

from __future__ import annotations

import struct
from typing import Any, Literal

import numpy as np
import soundfile
from numpy.typing import NDArray

from higgs_model.audio.writers import check_sample_rate, libsndfile_options

Pcm = NDArray[np.int16]
StreamFormat = Literal["pcm", "wav", "flac", "mp3", "opus"]
STREAM_FORMATS: tuple[StreamFormat, ...] = ("pcm", "wav", "flac", "mp3", "opus")
MEDIA_TYPES: dict[StreamFormat, str] = {
    "pcm": "audio/pcm",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
}

_UNKNOWN_SIZE = 0xFFFFFFFF
_SET_OGG_PAGE_LATENCY_MS = 0x1302
_PAGE_MS = 200.0
"""Opus audio per Ogg page. libsndfile's default would delay the output by a second."""


class StreamEncoder:
    """Encodes one stream. The encoder is freed with this object, in whichever thread drops the last reference.

    Raises:
        BadInput: the format does not support the sample rate.
    """

    def __init__(self, stream_format: StreamFormat, sample_rate_hz: int) -> None:
        check_sample_rate(stream_format, sample_rate_hz)
        self._sink = _Sink()
        self._file: Any = None
        self._skip_header = stream_format == "mp3"
        if stream_format == "wav":
            self._sink.write(wav_header(sample_rate_hz))
        if stream_format in ("flac", "mp3", "opus"):
            options = libsndfile_options(stream_format, sample_rate_hz)
            self._file = soundfile.SoundFile(self._sink, "w", sample_rate_hz, 1, **options)
        if stream_format == "opus":
            _set_ogg_page_latency(self._file)

    def write(self, samples_N: Pcm) -> bytes:
        """Encode samples and return the bytes that are ready to send."""
        if self._file is None:
            self._sink.write(samples_N.astype("<i2", copy=False).tobytes())
        else:
            self._file.write(samples_N)
        return self._drain()

    def finish(self) -> bytes:
        """End the stream and return the remaining bytes."""
        if self._file is not None:
            self._file.close()
        return self._drain()

    def _drain(self) -> bytes:
        content = self._sink.drain()
        if self._skip_header and content:
            # LAME starts with a frame of metadata that is only known at the end, and useless in a stream.
            self._skip_header = False
            content = content[self._sink.first_write_bytes :]
        return content


def wav_header(sample_rate_hz: int) -> bytes:
    """Return the 44-byte header of mono 16-bit samples of unknown number."""
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", _UNKNOWN_SIZE, b"WAVE", b"fmt ", 16, 1, 1),
        *(sample_rate_hz, 2 * sample_rate_hz, 2, 16, b"data", _UNKNOWN_SIZE),
    )


def _set_ogg_page_latency(file: Any) -> None:
    """Send a libsndfile command that soundfile does not expose."""
    value = soundfile._ffi.new("double*", _PAGE_MS)
    soundfile._snd.sf_command(file._file, _SET_OGG_PAGE_LATENCY_MS, value, 8)


class _Sink:
    """A write-only file object for libsndfile. Drained bytes are discarded, and so are writes over earlier bytes."""

    def __init__(self) -> None:
        self._pending: list[bytes] = []
        self._position = self._end = 0
        self.first_write_bytes = 0

    def write(self, content: Any) -> int:
        data = bytes(content)
        self.first_write_bytes = self.first_write_bytes or len(data)
        if self._position == self._end:
            self._pending.append(data)
            self._end += len(data)
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._end)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, _: Any) -> int:
        return 0

    def drain(self) -> bytes:
        content, self._pending = b"".join(self._pending), []
        return content
