"""The two resamplers that the checkpoints were trained with.

`resample` converts recordings to the codec's rate with soxr in high quality. `resample_sinc` is the windowed-sinc
resampler in front of the semantic model: the default filter of torchaudio, on any device, without torchaudio.

Both return ⌈N × to / from⌉ samples for N. `resample` computes that product in floating point, which may round it.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor

from higgs_model.errors import BadInput

SINC_ZERO_CROSSINGS = 6
"""Half width of the filter, in zero crossings of the sinc."""
SINC_ROLLOFF = 0.99
"""Cut-off frequency as a fraction of the lower Nyquist frequency."""


def resample(samples_N: npt.NDArray[np.float32], from_hz: int, to_hz: int) -> npt.NDArray[np.float32]:
    """Resample a complete recording (N,) float32.

    Raises:
        BadInput: `from_hz` is not positive.
    """
    if from_hz <= 0:
        raise BadInput(f"recording: the sample rate is {from_hz} Hz; expected a positive rate.")
    if from_hz == to_hz:
        return samples_N
    # In floating point, as librosa in the reference: it may yield one sample more, which changes the last frames.
    length = math.ceil(len(samples_N) * (to_hz / from_hz))
    resampled = soxr.resample(samples_N, from_hz, to_hz, quality="soxr_hq")[:length]
    return np.pad(resampled, (0, length - len(resampled)))


def resample_sinc(samples_BN: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Resample (B, N) → (B, ⌈N × to / from⌉), same dtype and device."""
    if from_hz == to_hz:
        return samples_BN
    divisor = math.gcd(from_hz, to_hz)
    step, phases = from_hz // divisor, to_hz // divisor
    kernel, half_width = _sinc_kernel(step, phases)
    padded = F.pad(samples_BN.unsqueeze(1), (half_width, half_width + step))
    resampled = F.conv1d(padded, kernel.to(samples_BN), stride=step)
    length = -(-samples_BN.shape[1] * phases // step)
    return resampled.transpose(1, 2).flatten(1)[:, :length]


@functools.lru_cache(maxsize=16)
def _sinc_kernel(step: int, phases: int) -> tuple[Tensor, int]:
    """Return one filter per phase, (phases, 1, taps), and the number of past samples that each needs.

    Output sample i × phases + p is at time i × step + p × step / phases of the input.
    """
    cutoff = min(step, phases) * SINC_ROLLOFF
    half_width = math.ceil(SINC_ZERO_CROSSINGS * step / cutoff)
    # In float32 and in this order: the checkpoints were trained with a filter rounded this way.
    taps = torch.arange(-half_width, half_width + step, dtype=torch.float32) / step
    offsets = torch.arange(0, -phases, -1, dtype=torch.float32).unsqueeze(1) / phases
    time = ((offsets + taps) * cutoff).clamp(-SINC_ZERO_CROSSINGS, SINC_ZERO_CROSSINGS)
    window = torch.cos(time * math.pi / SINC_ZERO_CROSSINGS / 2).square()
    angle = time * math.pi
    sinc = torch.where(angle == 0, torch.ones_like(angle), angle.sin() / angle)
    return (sinc * (window * (cutoff / step))).unsqueeze(1), half_width
