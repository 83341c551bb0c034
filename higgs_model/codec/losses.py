"""Losses of codec training and their weighted sum.

In: original and reconstructed samples (B, N), and the quantizer's and the semantic losses of the forward pass. Out:
scalars. The spectral losses are those of the Descript Audio Codec (https://arxiv.org/abs/2306.06546): multi-scale,
on linear and logarithmic magnitudes. No adversarial losses.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs_model.codec.network import CodecOutput

_EPSILON = 1e-10
STFT_WINDOWS = (2048, 512)
MEL_WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)
MEL_BANDS = (5, 10, 20, 40, 80, 160, 320)


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weight of each loss in the total."""

    mel: float = 15.0
    stft: float = 1.0
    waveform: float = 1.0
    commitment: float = 1.0
    codebook: float = 1.0
    semantic: float = 1.0


@dataclasses.dataclass(frozen=True)
class CodecLosses:
    """The unweighted losses (scalars), and `total`, their weighted sum."""

    total: Tensor
    mel: Tensor
    stft: Tensor
    waveform: Tensor
    commitment: Tensor
    codebook: Tensor
    semantic: Tensor


class CodecLoss(nn.Module):
    """Computes the losses of a forward pass against its input.

    Args:
        floor: magnitudes are clamped to this before the logarithm. For recordings with digital silence or limited
            bandwidth a low floor lets silence dominate the loss.
        shortest_window: in samples; mel spectra with shorter windows are skipped.
    """

    def __init__(
        self, sample_rate_hz: int, weights: LossWeights | None = None, *, floor: float = 1e-5, shortest_window: int = 32
    ) -> None:
        super().__init__()
        self.weights, self._floor = weights or LossWeights(), floor
        scales = zip(MEL_WINDOWS, MEL_BANDS, strict=True)
        self._scales = [(window, bands) for window, bands in scales if window >= shortest_window]
        for window, bands in self._scales:
            filters = mel_filters(sample_rate_hz, window, bands)
            self.register_buffer(f"mel_{window}", filters, persistent=False)

    def forward(self, output: CodecOutput, samples_BN: Tensor) -> CodecLosses:
        """Return the losses of a forward pass; the longer of input and reconstruction is truncated."""
        num_samples = min(output.audio.shape[1], samples_BN.shape[1])
        reconstruction, target = output.audio[:, :num_samples], samples_BN[:, :num_samples]
        losses = {
            "mel": self._mel(reconstruction, target),
            "stft": torch.stack(
                [self._spectral(_stft(reconstruction, w), _stft(target, w)) for w in STFT_WINDOWS]
            ).sum(),
            "waveform": F.l1_loss(reconstruction, target),
            "commitment": output.commitment_loss,
            "codebook": output.codebook_loss,
            "semantic": output.semantic_loss,
        }
        total = torch.stack([getattr(self.weights, name) * loss for name, loss in losses.items()]).sum()
        return CodecLosses(total=total, **losses)

    def _mel(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        parts = []
        for window, _ in self._scales:
            filters = self.get_buffer(f"mel_{window}")
            parts.append(
                F.l1_loss(
                    self._log(filters @ _stft(reconstruction, window)), self._log(filters @ _stft(target, window))
                )
            )
        return torch.stack(parts).mean()

    def _spectral(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(reconstruction, target) + F.l1_loss(self._log(reconstruction), self._log(target))

    def _log(self, magnitudes: Tensor) -> Tensor:
        return magnitudes.clamp_min(self._floor).log10()


def _stft(samples_BN: Tensor, window: int) -> Tensor:
    """Return STFT magnitudes (B, window // 2 + 1, frames) with a hop of a quarter window."""
    window_function = torch.hann_window(window, device=samples_BN.device)
    padded = F.pad(samples_BN, (window // 2, window // 2))
    spectrum = torch.stft(padded, window, window // 4, window=window_function, center=False, return_complex=True)
    # The gradient of the square root is infinite at zero.
    return (spectrum.real.square() + spectrum.imag.square() + _EPSILON).sqrt()


def mel_filters(sample_rate_hz: int, window: int, bands: int) -> Tensor:
    """Return triangular filters of equal area, evenly spaced in mel, (bands, window // 2 + 1).

    Narrow bands of a short window can fall between two bins; such filters are all zero and contribute no loss.
    """
    top = 2595 * torch.log10(torch.tensor(1 + sample_rate_hz / 2 / 700))
    edges_hz = 700 * (10 ** (torch.linspace(0, 1, bands + 2) * top / 2595) - 1)
    bins_hz = torch.linspace(0, sample_rate_hz / 2, window // 2 + 1)
    low, centre, high = (edges_hz[start : start + bands].unsqueeze(1) for start in (0, 1, 2))
    rising, falling = (bins_hz - low) / (centre - low), (high - bins_hz) / (high - centre)
    return torch.minimum(rising, falling).clamp_min(0) * 2 / (high - low)
