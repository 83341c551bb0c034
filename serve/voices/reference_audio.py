"""Validates reference recordings of requests before any other code reads them.

In: base64, a data URI, or the content of a file. Out: bytes that decode to a known number of samples, or `BadRequest`.
No string of a request is ever opened as a path. Decoding is bounded in channels, sample rate and samples, regardless of
what the file's header declares.
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
from higgs_model.script.voice_checks import check_recording
from higgs_model.script.voices import RECOMMENDED_DURATION
from serve.http.errors import BadRequest, PayloadTooLarge

_DATA_URI = re.compile(
    r"data:[A-Za-z0-9.+-]{1,50}/[A-Za-z0-9.+-]{1,50}(?:;[A-Za-z0-9.=+\"-]{1,100})*;base64,", re.ASCII
)
_MIN_DURATION_S = 0.2
_MIN_HZ, _MAX_HZ = 4_000, 192_000
_BLOCK_SAMPLES = 1 << 16
_MAGIC_BYTES = (
    re.compile(rb"RIFF....WAVE", re.DOTALL),
    re.compile(rb"fLaC"),
    re.compile(rb"OggS"),
    re.compile(rb"FORM....AIF[FC]", re.DOTALL),
    re.compile(rb"ID3"),
    re.compile(rb"\xff[\xe2-\xff]"),
)
"""WAV, FLAC, Ogg, AIFF and MP3, so that untrusted data never reaches libsndfile's less common parsers."""


@dataclasses.dataclass(frozen=True)
class ReferenceLimits:
    """Size and duration limits of a reference recording."""

    max_bytes: int
    max_s: float


@dataclasses.dataclass(frozen=True)
class CheckedRecording:
    """A fully decoded recording.

    Attributes:
        content: the file as it was sent.
        samples_N: (N,) mono samples, full scale ±1.
        num_channels: number of channels of the file.
        subtype: libsndfile's name of the file's sample format.
    """

    content: bytes
    samples_N: NDArray[np.float32]
    sample_rate_hz: int
    num_channels: int
    subtype: str

    @property
    def duration_s(self) -> float:
        return len(self.samples_N) / self.sample_rate_hz

    def warnings(self, transcript: str | None) -> list[str]:
        """Return advice on how to get a better clone; empty for a good recording."""
        warnings = check_recording(self.samples_N, self.sample_rate_hz, transcript)
        if self.num_channels > 1:
            warnings.append(
                f"it has {self.num_channels} channels, which were mixed; use a mono recording of one speaker"
            )
        return warnings

    def to_flac(self) -> bytes:
        """Encode the samples as FLAC, without the original file's tags and other metadata."""
        file = io.BytesIO()
        subtype = "PCM_16" if self.subtype in ("PCM_16", "PCM_S8", "PCM_U8", "MPEG_LAYER_III") else "PCM_24"
        soundfile.write(file, np.clip(self.samples_N, -1, 1), self.sample_rate_hz, format="FLAC", subtype=subtype)
        return file.getvalue()


def decode_reference(value: str, limits: ReferenceLimits) -> bytes:
    """Decode base64 or a data URI.

    Raises:
        BadRequest: the value is neither.
        PayloadTooLarge: the recording is larger than the limit.
    """
    if value.startswith("data:"):
        header = _DATA_URI.match(value[:1000])
        if header is None:
            raise BadRequest("ref_audio: a data URI must look like data:audio/wav;base64,…", param="ref_audio")
        value = value[header.end() :]
    if len(value) * 3 // 4 > limits.max_bytes + 3:
        raise PayloadTooLarge(f"ref_audio: a recording may have at most {limits.max_bytes} bytes", param="ref_audio")
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(
            "ref_audio: send the recording itself, as base64, a data URI or a multipart file; the server never "
            "opens a path",
            param="ref_audio",
        ) from None


def check_reference(content: bytes, limits: ReferenceLimits, param: str = "ref_audio") -> CheckedRecording:
    """Decode and validate a recording.

    Args:
        param: the request's field, for error messages.

    Raises:
        BadRequest: the content is not audio, or not usable as a reference.
        PayloadTooLarge: the content is larger than the limit.
    """
    if len(content) > limits.max_bytes:
        raise PayloadTooLarge(
            f"{param}: {len(content)} bytes; a recording may have at most {limits.max_bytes} bytes", param=param
        )
    if not any(magic.match(content) for magic in _MAGIC_BYTES):
        raise BadRequest(f"{param}: not a WAV, FLAC, MP3, Ogg or AIFF recording", param=param)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            _check_header(file, param)
            samples_N = _decode(file, limits, param)
            rate_hz, channels, subtype = file.samplerate, file.channels, file.subtype
    except (soundfile.LibsndfileError, ValueError, MemoryError):
        raise BadRequest(f"{param}: the recording cannot be decoded; is the file complete?", param=param) from None
    if len(samples_N) < _MIN_DURATION_S * rate_hz:
        raise BadRequest(
            f"{param}: {len(samples_N) / rate_hz:.2f} s is too short; expected {RECOMMENDED_DURATION} of speech",
            param=param,
        )
    try:
        return CheckedRecording(content, to_mono(samples_N), rate_hz, channels, subtype)
    except BadInput as error:
        raise BadRequest(f"{param}: {error}", param=param) from None


def _check_header(file: soundfile.SoundFile, param: str) -> None:
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise BadRequest(f"{param}: {file.channels} channels; expected 1 to {MAX_CHANNELS}", param=param)
    if not _MIN_HZ <= file.samplerate <= _MAX_HZ:
        raise BadRequest(f"{param}: {file.samplerate} Hz; expected {_MIN_HZ} to {_MAX_HZ}", param=param)


def _decode(file: soundfile.SoundFile, limits: ReferenceLimits, param: str) -> NDArray[np.float32]:
    """Return mono samples (N,); stop reading once the recording exceeds the limit."""
    max_samples = int(limits.max_s * file.samplerate)
    blocks, total = [np.empty(0, np.float32)], 0
    while len(block := file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
        total += len(block)
        if total > max_samples:
            raise BadRequest(
                f"{param}: longer than {limits.max_s:g} s; trim it to {RECOMMENDED_DURATION} of speech", param=param
            )
        blocks.append(block.mean(axis=1, dtype=np.float32))
    return np.concatenate(blocks)
