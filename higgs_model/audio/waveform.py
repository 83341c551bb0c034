"""What a waveform must be before anything is computed from it.

In: whatever a caller has: a NumPy array or a tensor, one or two axes. Out: mono float32 samples, or
`BadInput` in one sentence. Knows no file and no sample rate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

import numpy as np
import numpy.typing as npt

from higgs_model.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

# As text, because whoever only reads recordings need not load torch.
Waveform = Union[npt.NDArray[np.floating], "Tensor"]
MAX_CHANNELS = 8
"""More than this is taken for samples on the wrong axis."""


def to_mono(waveform: Waveform) -> npt.NDArray[np.float32]:
    """Mono samples (N,) of (N,) or (channels, N) floats; channels are averaged."""
    array = waveform.detach().cpu().float().numpy() if hasattr(waveform, "detach") else np.asarray(waveform)
    if not np.issubdtype(array.dtype, np.floating):
        raise BadInput(f"recording: its samples are {array.dtype}; wanted floats with full scale at ±1.")
    if array.ndim not in (1, 2) or (array.ndim == 2 and not 1 <= array.shape[0] <= MAX_CHANNELS):
        raise BadInput(
            f"recording: its samples have the shape {array.shape}; wanted (samples,) or (channels, samples) "
            f"with 1 to {MAX_CHANNELS} channels."
        )
    if array.shape[-1] == 0:
        raise BadInput("recording: it is empty; wanted at least one sample.")
    mono = array if array.ndim == 1 else array.mean(axis=0)
    mono = np.ascontiguousarray(mono, dtype=np.float32)
    finite = np.isfinite(mono)
    if not finite.all():
        raise BadInput(
            f"recording: {np.count_nonzero(~finite)} of its {len(mono)} samples are not numbers, "
            f"the first at sample {int(np.argmin(finite))}."
        )
    return mono
