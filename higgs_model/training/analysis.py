"""What a codec's latents are taught to be at first: the sound's own log spectra, a frame at a time.

In: samples (B, N). Out: (B, T, D), for each frame of the codec the principal components of its log mel spectra: one of
a long window, in which harmonics stand apart, and three of short windows. No phase is in it.

An autoencoder that begins with random latents has to find out at once what is worth saying and how it sounds; here the
encoder learns to say something that is known, and the decoder what that sounds like.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs_model.codec.losses import mel_filters

_LONG, _LONG_BANDS = 2048, 96
_SHORT, _SHORT_BANDS = 512, 40
_SHORT_PLACES = 3
_FLOOR = 3e-3


class Analysis(nn.Module):
    """Log spectra of the codec's frames, and a projection of them that is fitted once.

    Args:
        hop_samples: of a frame.
        width: D, at most the spectra's 216 numbers.
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, sample_rate_hz: int, hop_samples: int, width: int) -> None:
        super().__init__()
        self._hop = hop_samples
        self.register_buffer("long", mel_filters(sample_rate_hz, _LONG, _LONG_BANDS), persistent=False)
        self.register_buffer("short", mel_filters(sample_rate_hz, _SHORT, _SHORT_BANDS), persistent=False)
        self.register_buffer("mean", torch.zeros(_LONG_BANDS + _SHORT_PLACES * _SHORT_BANDS))
        self.register_buffer("basis", torch.zeros(len(self.mean), width))

    @classmethod
    def fitted(cls, sample_rate_hz: int, hop_samples: int, width: int, samples_BN: Tensor) -> Self:
        """With the projection that says most about these samples, to numbers whose mean square is 1."""
        one = cls(sample_rate_hz, hop_samples, width).to(samples_BN.device)
        spectra_NM = one._spectra(samples_BN).flatten(0, 1)
        one.mean.copy_(spectra_NM.mean(0))
        values, vectors = torch.linalg.eigh((spectra_NM - one.mean).t().cov())
        best, scale = vectors[:, -width:].flip(1), values[-width:].mean().sqrt()
        one.basis[:, : best.shape[1]].copy_(best / scale)
        return one

    @torch.no_grad()
    def forward(self, samples_BN: Tensor) -> Tensor:
        """(B, N) → (B, N // hop, D)."""
        return (self._spectra(samples_BN) - self.mean) @ self.basis

    def _spectra(self, samples_BN: Tensor) -> Tensor:
        """(B, T, M)."""
        num_frames = samples_BN.shape[1] // self._hop
        places = [self._log_mel(samples_BN, self.get_buffer("long"), _LONG, self._hop // 2, num_frames)]
        for place in range(_SHORT_PLACES):
            centre = (2 * place + 1) * self._hop // (2 * _SHORT_PLACES)
            places.append(self._log_mel(samples_BN, self.get_buffer("short"), _SHORT, centre, num_frames))
        return torch.cat(places, dim=-1)

    def _log_mel(self, samples_BN: Tensor, filters: Tensor, window: int, centre: int, num_frames: int) -> Tensor:
        """Of windows around `centre` of each frame, (B, T, bands)."""
        padded = F.pad(samples_BN, (window, window))
        first = padded[:, window // 2 + centre :].unfold(1, window, self._hop)[:, :num_frames]
        spectrum = torch.fft.rfft(first * torch.hann_window(window, device=first.device)).abs()
        return (spectrum @ filters.t()).clamp_min(_FLOOR).log10()
