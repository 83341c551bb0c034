"""Initial targets of a codec's latents: principal components of log mel spectra, per frame.

In: samples (B, N). Out: (B, T, D), for each codec frame the principal components of its log mel spectra: one with a
long window, which resolves harmonics, and three with short windows. They contain no phase.

An autoencoder that starts with random latents must learn a representation and its decoding at the same time. With these
targets the encoder learns a known representation, and the decoder learns to decode it.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs_model.codec.losses import mel_filters

_LONG_WINDOW, _LONG_BANDS = 2048, 96
_SHORT_WINDOW, _SHORT_BANDS = 512, 40
_SHORT_WINDOWS_PER_FRAME = 3
_FLOOR = 3e-3


class LogMelPCA(nn.Module):
    """Log mel spectra of codec frames, and their projection, which is fitted once.

    Args:
        sample_rate_hz: the codec's sample rate.
        hop_samples: samples per frame.
        width: D, at most 216, the number of mel bands of all windows.
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, sample_rate_hz: int, hop_samples: int, width: int) -> None:
        super().__init__()
        self._hop = hop_samples
        self.register_buffer("long", mel_filters(sample_rate_hz, _LONG_WINDOW, _LONG_BANDS), persistent=False)
        self.register_buffer("short", mel_filters(sample_rate_hz, _SHORT_WINDOW, _SHORT_BANDS), persistent=False)
        self.register_buffer("mean", torch.zeros(_LONG_BANDS + _SHORT_WINDOWS_PER_FRAME * _SHORT_BANDS))
        self.register_buffer("basis", torch.zeros(len(self.mean), width))

    @classmethod
    def fit(cls, sample_rate_hz: int, hop_samples: int, width: int, samples_BN: Tensor) -> Self:
        """Fit the projection to samples (B, N): their principal components, scaled to a mean square of 1."""
        pca = cls(sample_rate_hz, hop_samples, width).to(samples_BN.device)
        spectra_NM = pca._spectra(samples_BN).flatten(0, 1)
        pca.mean.copy_(spectra_NM.mean(0))
        values, vectors = torch.linalg.eigh((spectra_NM - pca.mean).t().cov())
        components, scale = vectors[:, -width:].flip(1), values[-width:].mean().sqrt()
        pca.basis[:, : components.shape[1]].copy_(components / scale)
        return pca

    @torch.no_grad()
    def forward(self, samples_BN: Tensor) -> Tensor:
        """Return the components (B, N // hop, D) of samples (B, N)."""
        return (self._spectra(samples_BN) - self.mean) @ self.basis

    def _spectra(self, samples_BN: Tensor) -> Tensor:
        """Return the log mel spectra (B, T, M) of all windows, concatenated."""
        num_frames = samples_BN.shape[1] // self._hop
        spectra = [self._log_mel(samples_BN, self.get_buffer("long"), _LONG_WINDOW, self._hop // 2, num_frames)]
        for index in range(_SHORT_WINDOWS_PER_FRAME):
            centre = (2 * index + 1) * self._hop // (2 * _SHORT_WINDOWS_PER_FRAME)
            spectra.append(self._log_mel(samples_BN, self.get_buffer("short"), _SHORT_WINDOW, centre, num_frames))
        return torch.cat(spectra, dim=-1)

    def _log_mel(self, samples_BN: Tensor, filters: Tensor, window: int, centre: int, num_frames: int) -> Tensor:
        """Return the log mel spectra (B, T, bands) of windows centred on sample `centre` of each frame."""
        padded = F.pad(samples_BN, (window, window))
        windows = padded[:, window // 2 + centre :].unfold(1, window, self._hop)[:, :num_frames]
        spectrum = torch.fft.rfft(windows * torch.hann_window(window, device=windows.device)).abs()
        return (spectrum @ filters.t()).clamp_min(_FLOOR).log10()
