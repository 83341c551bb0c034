"""Audio formats as streams: bytes that can be sent while the samples are still being made.

In: mono 16-bit samples in any portions. Out: bytes of PCM, WAV, FLAC, MP3 or Opus that are never taken back. What a
file says of itself at its beginning and only learns at its end is left open as each format has it for streams: the
sizes of a WAV are 0xFFFFFFFF, a FLAC has an unknown number of samples, an MP3 has no header at all, so that MP3
streams may simply be put one after the other.
"""

from __future__ import annotations

import struct
from typing import Any, Literal

import numpy as np
import soundfile
from numpy.typing import NDArray

from higgs_model.audio.writers import check_rate, encoding

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
"""Of Opus in one Ogg page: libsndfile would wait for a second."""


class StreamEncoder:
    """One stream under way. Its encoder is let go of with it, in whatever thread holds it last.

    Raises:
        BadInput: the format cannot hold that rate.
    """

    def __init__(self, stream_format: StreamFormat, sample_rate_hz: int) -> None:
        check_rate(stream_format, sample_rate_hz)
        self._sink = _Sink()
        self._file: Any = None
        self._skip_header = stream_format == "mp3"
        if stream_format == "wav":
            self._sink.write(wav_header(sample_rate_hz))
        if stream_format in ("flac", "mp3", "opus"):
            options = encoding(stream_format, sample_rate_hz)
            self._file = soundfile.SoundFile(self._sink, "w", sample_rate_hz, 1, **options)
        if stream_format == "opus":
            _set_page_latency(self._file)

    def write(self, samples_N: Pcm) -> bytes:
        """What can be sent of the stream so far."""
        if self._file is None:
            self._sink.write(samples_N.astype("<i2", copy=False).tobytes())
        else:
            self._file.write(samples_N)
        return self._sent()

    def finish(self) -> bytes:
        """The rest."""
        if self._file is not None:
            self._file.close()
        return self._sent()

    def _sent(self) -> bytes:
        content = self._sink.take()
        if self._skip_header and content:
            # LAME begins with a frame for facts that are only known at the end; as a stream has it, it says nothing.
            self._skip_header = False
            content = content[self._sink.first_write_bytes :]
        return content


def wav_header(sample_rate_hz: int) -> bytes:
    """44 bytes in front of mono 16-bit samples whose number is not known."""
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", _UNKNOWN_SIZE, b"WAVE", b"fmt ", 16, 1, 1),
        *(sample_rate_hz, 2 * sample_rate_hz, 2, 16, b"data", _UNKNOWN_SIZE),
    )


def _set_page_latency(file: Any) -> None:
    """libsndfile has a command for it, which soundfile has no name for."""
    value = soundfile._ffi.new("double*", _PAGE_MS)
    soundfile._snd.sf_command(file._file, _SET_OGG_PAGE_LATENCY_MS, value, 8)


class _Sink:
    """A file for libsndfile that forgets what has been taken from it; what is written over earlier bytes is dropped."""

    def __init__(self) -> None:
        self._new: list[bytes] = []
        self._position = self._end = 0
        self.first_write_bytes = 0

    def write(self, content: Any) -> int:
        piece = bytes(content)
        self.first_write_bytes = self.first_write_bytes or len(piece)
        if self._position == self._end:
            self._new.append(piece)
            self._end += len(piece)
        self._position += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._end)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, _: Any) -> int:
        return 0

    def take(self) -> bytes:
        content, self._new = b"".join(self._new), []
        return content
