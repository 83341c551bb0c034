"""Validation of waveforms before anything is computed from them.

In: a NumPy array or a tensor with one or two axes. Out: mono float32 samples, or `BadInput` in one sentence.
Independent of files and sample rates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

import numpy as np
import numpy.typing as npt

from higgs_model.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

# A string, so that reading recordings does not import torch.
Waveform = Union[npt.NDArray[np.floating], "Tensor"]
MAX_CHANNELS = 8
"""A larger first axis is assumed to hold samples instead of channels."""


def to_mono(waveform: Waveform) -> npt.NDArray[np.float32]:
    """Return mono samples (N,) float32 from (N,) or (channels, N) floats; channels are averaged.

    Raises:
        BadInput: the samples are not floats, not finite or none at all, or the shape is another.
    """
    array = waveform.detach().cpu().float().numpy() if hasattr(waveform, "detach") else np.asarray(waveform)
    if not np.issubdtype(array.dtype, np.floating):
        raise BadInput(f"recording: the samples are {array.dtype}; expected floats with full scale at ±1.")
    if array.ndim not in (1, 2) or (array.ndim == 2 and not 1 <= array.shape[0] <= MAX_CHANNELS):
        raise BadInput(
            f"recording: the samples have shape {array.shape}; expected (samples,) or (channels, samples) "
            f"with 1 to {MAX_CHANNELS} channels."
        )
    if array.shape[-1] == 0:
        raise BadInput("recording: it is empty; expected at least one sample.")
    mono = array if array.ndim == 1 else array.mean(axis=0)
    mono = np.ascontiguousarray(mono, dtype=np.float32)
    finite = np.isfinite(mono)
    if not finite.all():
        raise BadInput(
            f"recording: {np.count_nonzero(~finite)} of {len(mono)} samples are NaN or infinite, "
            f"the first at sample {int(np.argmin(finite))}."
        )
    return mono
