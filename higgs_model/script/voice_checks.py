"""Checks of reference recordings, with advice on how to get a better clone. None of them rejects a recording."""

from __future__ import annotations

from typing import TYPE_CHECKING

from higgs_model.script.languages import count_words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SHORT_BELOW_S, _LONG_ABOVE_S = 3.0, 30.0
_MIN_HZ, _RECOMMENDED_HZ = 16_000, 24_000
_CLIPPED_LEVEL, _MAX_CLIPPED_SHARE = 0.999, 1e-3
_SILENT_RMS, _MAX_SILENT_SHARE, _EDGE_S = 10 ** (-50 / 20), 0.5, 0.5
_WINDOW_S = 0.02
_WORDS_PER_S = (0.7, 6.0)


def check_recording(samples: NDArray[np.float32], sample_rate: int, transcript: str | None) -> list[str]:
    """Return the problems of a reference recording, with advice on how to fix them.

    Args:
        samples: (N,) in −1 … 1.
    """
    import numpy as np

    duration_s = len(samples) / sample_rate
    warnings: list[str] = []
    if duration_s < _SHORT_BELOW_S:
        warnings.append(
            f"it is {duration_s:.1f} s long; {_SHORT_BELOW_S:.0f} s or more of speech give a more stable voice"
        )
    if duration_s > _LONG_ABOVE_S:
        warnings.append(f"it is {duration_s:.1f} s long; trim it to {_LONG_ABOVE_S:.0f} s or less to save context")
    if sample_rate < _MIN_HZ:
        warnings.append(f"its sample rate is {sample_rate} Hz, which sounds dull; record at {_RECOMMENDED_HZ} Hz")
    clipped = float(np.mean(np.abs(samples) >= _CLIPPED_LEVEL))
    if clipped > _MAX_CLIPPED_SHARE:
        warnings.append(f"{clipped:.1%} of it is clipped; record it again at a lower level")
    warnings += _silence_warnings(samples, sample_rate)
    warnings += _transcript_warnings(duration_s, transcript)
    return warnings


def _silence_warnings(samples: NDArray[np.float32], sample_rate: int) -> list[str]:
    import numpy as np

    window = max(1, round(_WINDOW_S * sample_rate))
    windows = samples[: len(samples) // window * window].astype(np.float64).reshape(-1, window)
    loud = np.flatnonzero(np.sqrt(np.mean(windows**2, axis=1)) > _SILENT_RMS)
    if len(loud) == 0:
        return ["it is silent; check the file"]
    warnings: list[str] = []
    head_s, tail_s = loud[0] * _WINDOW_S, (len(windows) - 1 - loud[-1]) * _WINDOW_S
    if max(head_s, tail_s) > _EDGE_S:
        warnings.append(f"it starts with {head_s:.1f} s and ends with {tail_s:.1f} s of silence; trim it")
    silent = 1 - len(loud) / len(windows)
    if silent > _MAX_SILENT_SHARE:
        warnings.append(f"{silent:.0%} of it is silence; choose a passage with continuous speech")
    return warnings


def _transcript_warnings(duration_s: float, transcript: str | None) -> list[str]:
    if transcript is None:
        return ["it has no transcript, so it goes into the system message; a transcript gives a closer clone"]
    rate = count_words(transcript) / duration_s
    slowest, fastest = _WORDS_PER_S
    if not slowest <= rate <= fastest:
        return [f"its transcript has {rate:.1f} words per second, so it does not match the recording; check it"]
    return []
