"""Speech of the synthesizers that Debian packages, as the codec wants it.

In: a voice, a language, a text. Out: (N,) float32 samples at 24 kHz, trimmed, all of one peak. The same every time.
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
_SILENT_BELOW = 0.004
_EDGE_S = 0.06
"""Silence that is left before the first and after the last sound."""


class NoSynthesizer(BadInput):
    """A synthesizer is not installed."""


def check_synthesizers() -> None:
    """Raises `NoSynthesizer`, naming what to install."""
    missing = sorted({voice.command[0] for voice in VOICES if shutil.which(voice.command[0]) is None})
    if missing:
        raise NoSynthesizer(f"{' and '.join(missing)} not found; on Debian: apt-get install {' '.join(missing)}")


def speak(voice: Voice, language: str, text: str) -> NDArray[np.float32]:
    """The text in that voice, (N,) at `SAMPLE_RATE_HZ`."""
    done = subprocess.run([*voice.arguments(language), text], capture_output=True, check=True)
    samples, rate_hz = soundfile.read(io.BytesIO(_sized(done.stdout)), dtype="float32")
    samples = _trim(resample(samples, rate_hz * voice.size_percent // 100, SAMPLE_RATE_HZ))
    return samples * (_PEAK / np.abs(samples).max())


def _sized(wav: bytes) -> bytes:
    """The same file with true sizes in its header: what goes to a pipe is begun before its length is known."""
    data = wav.index(b"data")
    size = len(wav) - data - 8
    return (
        b"RIFF" + (data + size).to_bytes(4, "little") + wav[8 : data + 4] + size.to_bytes(4, "little") + wav[data + 8 :]
    )


def _trim(samples_N: NDArray[np.float32]) -> NDArray[np.float32]:
    loud = np.flatnonzero(np.abs(samples_N) > _SILENT_BELOW * np.abs(samples_N).max())
    edge = round(_EDGE_S * SAMPLE_RATE_HZ)
    kept = samples_N[max(loud[0] - edge, 0) : loud[-1] + edge]
    return np.pad(kept, (max(edge - loud[0], 0), max(loud[-1] + edge - len(samples_N), 0)))
