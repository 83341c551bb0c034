"""Speech of the teachers, the synthesizers in Debian's packages that the demo learns from.

In: a voice, a language, a text. Out: (N,) float32 samples at 24 kHz, trimmed and peak-normalized, the same every time.
"""

from __future__ import annotations

import io
import shutil
import subprocess

import numpy as np
import soundfile
from numpy.typing import NDArray

from higgs_model.audio.resample import resample
from higgs_model.errors import BadInput
from jobs.demo.voices import VOICES, Voice

SAMPLE_RATE_HZ = 24_000
_PEAK = 0.7
_SILENCE_THRESHOLD = 0.004
"""Relative to the peak."""
_EDGE_S = 0.06
"""Silence kept before the first and after the last sound."""


class SynthesizerNotInstalled(BadInput):
    """A synthesizer that the voices need is not installed."""


def check_synthesizers() -> None:
    """Raise `SynthesizerNotInstalled`, naming the packages to install, if a synthesizer is missing."""
    missing = sorted({voice.command[0] for voice in VOICES if shutil.which(voice.command[0]) is None})
    if missing:
        raise SynthesizerNotInstalled(
            f"{' and '.join(missing)} not found; on Debian: apt-get install {' '.join(missing)}"
        )


def synthesize(voice: Voice, language: str, text: str) -> NDArray[np.float32]:
    """Synthesize a text in a voice; returns samples (N,) at `SAMPLE_RATE_HZ`."""
    completed = subprocess.run([*voice.command_line(language), text], capture_output=True, check=True)
    samples, rate_hz = soundfile.read(io.BytesIO(_fix_wav_sizes(completed.stdout)), dtype="float32")
    samples = _trim(resample(samples, rate_hz * voice.size_percent // 100, SAMPLE_RATE_HZ))
    return samples * (_PEAK / np.abs(samples).max())


def _fix_wav_sizes(wav: bytes) -> bytes:
    """Set the sizes in a WAV header: a program that writes to a pipe does not know them in advance."""
    data = wav.index(b"data")
    size = len(wav) - data - 8
    return (
        b"RIFF" + (data + size).to_bytes(4, "little") + wav[8 : data + 4] + size.to_bytes(4, "little") + wav[data + 8 :]
    )


def _trim(samples_N: NDArray[np.float32]) -> NDArray[np.float32]:
    audible = np.flatnonzero(np.abs(samples_N) > _SILENCE_THRESHOLD * np.abs(samples_N).max())
    edge = round(_EDGE_S * SAMPLE_RATE_HZ)
    trimmed = samples_N[max(audible[0] - edge, 0) : audible[-1] + edge]
    return np.pad(trimmed, (max(edge - audible[0], 0), max(audible[-1] + edge - len(samples_N), 0)))
