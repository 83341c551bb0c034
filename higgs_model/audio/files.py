"""Reading recordings from files.

In: a path or an open binary file. Out: mono float32 samples with their sample rate, or `BadInput` in one sentence that
names the file. Supports every format of libsndfile: WAV of 8 to 64 bits, FLAC, MP3, Ogg Vorbis, Opus, AIFF and more, at
any sample rate. Files are read and mixed down block by block, so that a long recording takes no more memory than its
mono samples.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile

from higgs_model.audio.waveform import to_mono
from higgs_model.errors import BadInput

_BLOCK_FRAMES = 1 << 18


@dataclasses.dataclass(frozen=True)
class Recording:
    """Mono samples (N,) float32, full scale ±1, all finite, at least one."""

    samples: npt.NDArray[np.float32]
    sample_rate_hz: int

    @property
    def duration_s(self) -> float:
        return len(self.samples) / self.sample_rate_hz


@dataclasses.dataclass(frozen=True)
class Header:
    """Properties of a recording from its file header, before any sample is read."""

    duration_s: float
    sample_rate_hz: int
    num_channels: int


def read_header(source: str | Path | BinaryIO, name: str | None = None) -> Header:
    """Read a recording's header; arguments as in `read_recording`."""
    source, name = _check_source(source, name)
    try:
        with soundfile.SoundFile(source) as file:
            return Header(file.frames / file.samplerate, file.samplerate, file.channels)
    except soundfile.LibsndfileError as error:
        raise _unreadable_error(name, error) from error


def read_recording(source: str | Path | BinaryIO, name: str | None = None) -> Recording:
    """Read one recording.

    Args:
        source: a path, or a seekable binary file.
        name: the name used in error messages; defaults to the path.

    Raises:
        BadInput: the file is missing, unreadable or empty, or holds samples that are not finite.
    """
    source, name = _check_source(source, name)
    try:
        with soundfile.SoundFile(source) as file:
            blocks = [block.mean(axis=1) for block in file.blocks(_BLOCK_FRAMES, dtype="float32", always_2d=True)]
            sample_rate_hz = file.samplerate
    except soundfile.LibsndfileError as error:
        raise _unreadable_error(name, error) from error
    if not blocks:
        raise BadInput(f"{name}: the recording has no samples.")
    try:
        return Recording(to_mono(np.concatenate(blocks)), sample_rate_hz)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None


def _check_source(source: str | Path | BinaryIO, name: str | None) -> tuple[str | Path | BinaryIO, str]:
    if isinstance(source, str | Path):
        name = name or str(source)
        _check_path(Path(source), name)
    return source, name or "recording"


def _unreadable_error(name: str, error: soundfile.LibsndfileError) -> BadInput:
    return BadInput(f"{name}: not a readable recording ({error.error_string.rstrip('.')}).")


def _check_path(path: Path, name: str) -> None:
    if path.is_dir():
        raise BadInput(f"{name}: is a folder; expected a recording.")
    if not path.exists():
        raise BadInput(f"{name}: no such file.")
    if path.stat().st_size == 0:
        raise BadInput(f"{name}: the file is empty (0 bytes); expected a recording.")
