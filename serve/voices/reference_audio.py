"""Reference recordings that come with requests: how they may come, and what is checked before anything else hears them.

In: base64, a data URI, the bytes of a multipart file, or a URL of an allowed place. Out: bytes that decode to a known
number of samples, or `BadRequest`. No string of a request is ever opened as a path. Decoding is bounded in channels,
rate and samples, whatever the file says of itself.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import re

import numpy as np
import soundfile
from numpy.typing import NDArray

from higgs_model.audio.waveform import MAX_CHANNELS, to_mono
from higgs_model.errors import BadInput
from higgs_model.script.voices import check_recording
from serve.http.errors import BadRequest, TooLarge

_DATA_URI = re.compile(
    r"data:[A-Za-z0-9.+-]{1,50}/[A-Za-z0-9.+-]{1,50}(?:;[A-Za-z0-9.=+\"-]{1,100})*;base64,", re.ASCII
)
_SHORTEST_S = 0.2
_LOWEST_HZ, _HIGHEST_HZ = 4_000, 192_000
_BLOCK = 1 << 16
_BEGINNINGS = (
    re.compile(rb"RIFF....WAVE", re.DOTALL),
    re.compile(rb"fLaC"),
    re.compile(rb"OggS"),
    re.compile(rb"FORM....AIF[FC]", re.DOTALL),
    re.compile(rb"ID3"),
    re.compile(rb"\xff[\xe2-\xff]"),
)
"""Of WAV, FLAC, Ogg, AIFF and MP3: the rarer parsers of libsndfile are not shown what strangers send."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one recording."""

    max_bytes: int
    max_s: float


@dataclasses.dataclass(frozen=True)
class CheckedRecording:
    """A recording that was decoded to its end: mono samples (N,)."""

    content: bytes
    samples_N: NDArray[np.float32]
    sample_rate_hz: int
    num_channels: int
    subtype: str

    @property
    def duration_s(self) -> float:
        return len(self.samples_N) / self.sample_rate_hz

    def warnings(self, transcript: str | None) -> list[str]:
        """What would make a better clone, in words."""
        found = check_recording(self.samples_N, self.sample_rate_hz, transcript)
        if self.num_channels > 1:
            found.append(f"it has {self.num_channels} channels, which were mixed; give a mono recording of one speaker")
        return found

    def flac(self) -> bytes:
        """The same sound and nothing else: what was hidden in the file stays behind."""
        file = io.BytesIO()
        subtype = "PCM_16" if self.subtype in ("PCM_16", "PCM_S8", "PCM_U8", "MPEG_LAYER_III") else "PCM_24"
        soundfile.write(file, np.clip(self.samples_N, -1, 1), self.sample_rate_hz, format="FLAC", subtype=subtype)
        return file.getvalue()


def decode_text(value: str, limits: Limits) -> bytes:
    """The bytes of base64 or of a data URI.

    Raises:
        BadRequest: it is neither. TooLarge: it would be too long.
    """
    if value.startswith("data:"):
        head = _DATA_URI.match(value[:1000])
        if head is None:
            raise BadRequest("ref_audio: a data URI must look like data:audio/wav;base64,…", param="ref_audio")
        value = value[head.end() :]
    if len(value) * 3 // 4 > limits.max_bytes + 3:
        raise TooLarge(f"ref_audio: a recording may have {limits.max_bytes} bytes", param="ref_audio")
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(
            "ref_audio: send the recording itself, as base64, a data URI or a multipart file; no file of the server is "
            "ever opened",
            param="ref_audio",
        ) from None


def check(content: bytes, limits: Limits, param: str = "ref_audio") -> CheckedRecording:
    """Decode a recording, but no more of it than may be.

    Raises:
        BadRequest: it is no recording, or one that nothing can be learnt from. TooLarge: too many bytes.
    """
    if len(content) > limits.max_bytes:
        raise TooLarge(f"{param}: {len(content)} bytes; a recording may have {limits.max_bytes}", param=param)
    if not any(beginning.match(content) for beginning in _BEGINNINGS):
        raise BadRequest(f"{param}: not a WAV, FLAC, MP3, Ogg or AIFF recording", param=param)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            _check_header(file, param)
            samples_N = _decoded(file, limits, param)
            rate_hz, channels, subtype = file.samplerate, file.channels, file.subtype
    except (soundfile.LibsndfileError, ValueError, MemoryError):
        raise BadRequest(f"{param}: the recording cannot be read; is it whole?", param=param) from None
    if len(samples_N) < _SHORTEST_S * rate_hz:
        raise BadRequest(
            f"{param}: {len(samples_N) / rate_hz:.2f} s are too short; give 5 to 20 s of speech", param=param
        )
    try:
        return CheckedRecording(content, to_mono(samples_N), rate_hz, channels, subtype)
    except BadInput as error:
        raise BadRequest(f"{param}: {error}", param=param) from None


def _check_header(file: soundfile.SoundFile, param: str) -> None:
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise BadRequest(f"{param}: {file.channels} channels; wanted 1 to {MAX_CHANNELS}", param=param)
    if not _LOWEST_HZ <= file.samplerate <= _HIGHEST_HZ:
        raise BadRequest(f"{param}: {file.samplerate} Hz; wanted {_LOWEST_HZ} to {_HIGHEST_HZ}", param=param)


def _decoded(file: soundfile.SoundFile, limits: Limits, param: str) -> NDArray[np.float32]:
    """Mono samples (N,), read until the end or the limit, whichever comes first."""
    most = int(limits.max_s * file.samplerate)
    blocks, total = [np.empty(0, np.float32)], 0
    while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        total += len(block)
        if total > most:
            raise BadRequest(f"{param}: longer than {limits.max_s:g} s; cut it to 5 to 20 s of speech", param=param)
        blocks.append(block.mean(axis=1, dtype=np.float32))
    return np.concatenate(blocks)
