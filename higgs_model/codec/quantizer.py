"""Residual quantizers: latents (B, T, D) ↔ codes (B, K, T).

`ResidualVectorQuantizer`: each codebook projects the residual of the previous ones to the codebook's width, takes the
nearest code and projects back. `ResidualFiniteScalarQuantizer`: each step rounds the residual to a grid that is finer
than the previous one by the number of levels; only its projections are trainable.

Both compute in float32 whatever the dtype of the rest of the codec, because the choice of a code is discrete. Training
uses the straight-through estimator. Does not depend on samples or checkpoints; parameter names are those of the
transformers layout.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs_model.codec.config import HiggsAudioCodecConfig


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Output of a quantizer in training.

    Attributes:
        latents: (B, T, D), quantized.
        codes: (B, K, T) int64.
        commitment_loss: pulls the encoder's output towards the codes (scalar).
        codebook_loss: pulls the codes towards the encoder's output (scalar); zero unless codebooks are trained by
            gradient.
    """

    latents: Tensor
    codes: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor


class EuclideanCodebook(nn.Module):
    """Codebook with the statistics of its exponential-moving-average (EMA) update.

    Attributes:
        embed: (size, width), the codes.
        cluster_size: (size,), moving average of the number of vectors assigned to each code.
        embed_avg: (size, width), moving average of the sum of these vectors.
        inited: (1,), 0 until the first training batch has initialized the codes.
        trained_by_gradient: `embed` is an ordinary parameter instead.
    """

    decay = 0.99
    dead_code_threshold = 2.0
    """Codes with fewer vectors per batch than this, by moving average, are replaced by vectors of the batch."""

    inited: Tensor
    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(size, width) / width**0.5, requires_grad=False)
        self.register_buffer("inited", torch.zeros(1))
        self.register_buffer("cluster_size", torch.zeros(size))
        self.register_buffer("embed_avg", self.embed.detach().clone())

    @property
    def trained_by_gradient(self) -> bool:
        return self.embed.requires_grad

    def nearest(self, vectors: Tensor) -> Tensor:
        """Return the index of the nearest code of each vector: (…, width) → (…,)."""
        flat = vectors.flatten(0, -2)
        codes = self.embed.t()
        distance = flat.square().sum(1, keepdim=True) - 2 * flat @ codes + codes.square().sum(0, keepdim=True)
        return distance.argmin(dim=1).view(vectors.shape[:-1])

    @torch.no_grad()
    def initialize(self, vectors: Tensor) -> None:
        """Initialize the codes with vectors of the first batch."""
        if self.inited.item():
            return
        self.embed.copy_(_sample_vectors(vectors.flatten(0, -2), len(self.embed)))
        self.embed_avg.copy_(self.embed)
        self.cluster_size.fill_(self.dead_code_threshold)
        self.inited.fill_(1)

    @torch.no_grad()
    def fit_to(self, vectors_NW: Tensor, iterations: int) -> None:
        """Set the codes to the k-means centroids of the vectors; empty clusters are re-seeded with random vectors."""
        self.embed.copy_(_sample_vectors(vectors_NW, len(self.embed)))
        for _ in range(iterations):
            assigned_NC = F.one_hot(self.nearest(vectors_NW), len(self.embed)).to(vectors_NW.dtype)
            counts_C = assigned_NC.sum(0)
            self.embed.copy_(assigned_NC.t() @ vectors_NW / counts_C.clamp_min(1).unsqueeze(1))
            empty = counts_C == 0
            self.embed[empty] = _sample_vectors(vectors_NW, int(empty.sum()))
        self.cluster_size.fill_(self.dead_code_threshold * 2)
        self.embed_avg.copy_(self.embed * self.dead_code_threshold * 2)
        self.inited.fill_(1)

    @torch.no_grad()
    def ema_update(self, vectors: Tensor, indices: Tensor) -> None:
        """Update the averages and, unless trained by gradient, the codes with a batch, and replace dead codes."""
        flat, assigned = vectors.flatten(0, -2), F.one_hot(indices.flatten(), len(self.embed)).to(vectors.dtype)
        self.cluster_size.lerp_(assigned.sum(0), 1 - self.decay)
        if not self.trained_by_gradient:
            self.embed_avg.lerp_(assigned.t() @ flat, 1 - self.decay)
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + 1e-5) / (total + len(self.embed) * 1e-5) * total
            self.embed.copy_(self.embed_avg / smoothed.unsqueeze(1))
        dead = self.cluster_size < self.dead_code_threshold
        if dead.any():
            replacements = _sample_vectors(flat, int(dead.sum()))
            self.embed[dead] = replacements
            self.embed_avg[dead] = replacements * self.dead_code_threshold
            self.cluster_size[dead] = self.dead_code_threshold


def _sample_vectors(vectors: Tensor, count: int) -> Tensor:
    """Sample `count` rows of (N, D), without replacement if there are enough."""
    if len(vectors) >= count:
        return vectors[torch.randperm(len(vectors), device=vectors.device)[:count]]
    return vectors[torch.randint(len(vectors), (count,), device=vectors.device)]


class VectorQuantizer(nn.Module):
    """A codebook with its input and output projections."""

    def __init__(self, dim: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        projects = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if projects else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if projects else nn.Identity()
        self.codebook = EuclideanCodebook(codebook_size, codebook_dim)

    def decode(self, indices_BT: Tensor) -> Tensor:
        """Return the latents (B, T, D) of indices (B, T)."""
        return self.project_out(F.embedding(indices_BT, self.codebook.embed))

    def init_projections(self, vectors_ND: Tensor) -> None:
        """Initialize the projections with the principal components of the vectors."""
        project_in, project_out = self.project_in, self.project_out
        if not (isinstance(project_in, nn.Linear) and isinstance(project_out, nn.Linear)):
            # The codebook is as wide as its input.
            return
        mean_D = vectors_ND.mean(0)
        basis_DW = torch.linalg.eigh((vectors_ND - mean_D).t().cov()).eigenvectors[:, -len(project_in.weight) :]
        project_in.weight.copy_(basis_DW.t())
        project_in.bias.copy_(-basis_DW.t() @ mean_D)
        project_out.weight.copy_(basis_DW)
        project_out.bias.copy_(mean_D)


class ResidualVectorQuantizer(nn.Module):
    """K vector quantizers, each of which quantizes the residual of the previous ones."""

    def __init__(self, config: HiggsAudioCodecConfig) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(
            VectorQuantizer(config.quantizer_width, config.codebook_size, config.codebook_width)
            for _ in range(config.num_codebooks)
        )

    def encode(self, latents_BTD: Tensor, num_codebooks: int) -> Tensor:
        """Return the codes (B, K, T) of latents (B, T, D)."""
        residual, codes = latents_BTD, []
        for quantizer in self._active_quantizers(num_codebooks):
            codes.append(quantizer.codebook.nearest(quantizer.project_in(residual)))
            residual = residual - quantizer.decode(codes[-1])
        return torch.stack(codes, dim=1)

    def decode(self, codes_BKT: Tensor) -> Tensor:
        """Return the latents (B, T, D) of codes (B, K, T); K may be less than the number of codebooks."""
        first, *rest = zip(self._active_quantizers(codes_BKT.shape[1]), codes_BKT.unbind(1), strict=True)
        latents = first[0].decode(first[1])
        for quantizer, indices in rest:
            latents = latents + quantizer.decode(indices)
        return latents

    def forward(self, latents_BTD: Tensor, num_codebooks: int) -> Quantized:
        """Quantize for training; in training mode codebooks are updated with the batch."""
        residual, out = latents_BTD, torch.zeros_like(latents_BTD)
        codes, commitment_losses, codebook_losses = [], [], []
        for quantizer in self._active_quantizers(num_codebooks):
            codebook, vectors = quantizer.codebook, quantizer.project_in(residual)
            if self.training:
                codebook.initialize(vectors)
            indices = codebook.nearest(vectors)
            chosen = F.embedding(indices, codebook.embed)
            commitment_losses.append(F.mse_loss(vectors, chosen.detach()))
            codebook_losses.append(
                F.mse_loss(chosen, vectors.detach()) if codebook.trained_by_gradient else vectors.new_zeros(())
            )
            # Straight-through estimator.
            quantized = quantizer.project_out(vectors + (chosen - vectors).detach())
            if self.training:
                codebook.ema_update(vectors, indices)
            residual, out = residual - quantized, out + quantized
            codes.append(indices)
        return Quantized(
            out,
            torch.stack(codes, dim=1),
            torch.stack(commitment_losses).mean(),
            torch.stack(codebook_losses).mean(),
        )

    @torch.no_grad()
    def fit_to(self, latents_ND: Tensor, iterations: int = 10) -> None:
        """Initialize from latents: projections by principal component analysis, codes by k-means.

        Args:
            latents_ND: (N, D) float32, N about ten times the codebook size or more.
            iterations: k-means iterations.
        """
        residual = latents_ND
        for quantizer in self._active_quantizers(len(self.quantizers)):
            if isinstance(quantizer.project_in, nn.Linear):
                quantizer.init_projections(residual)
            vectors = quantizer.project_in(residual)
            quantizer.codebook.fit_to(vectors, iterations)
            residual = residual - quantizer.decode(quantizer.codebook.nearest(vectors))

    def _active_quantizers(self, num_codebooks: int) -> list[VectorQuantizer]:
        return cast(list[VectorQuantizer], list(self.quantizers[:num_codebooks]))


class ResidualFiniteScalarQuantizer(nn.Module):
    """K roundings to a grid of `levels`, each grid finer than the previous one by the number of levels.

    Dimension d of the grid has the values −1, −1 + 2/(L_d − 1), …, 1. A code is the mixed-radix number of the grid
    indices, with the first dimension as the least significant digit. This is the symmetric form
    (https://arxiv.org/abs/2411.19842) of current vector-quantize-pytorch; earlier releases used another grid.
    """

    levels: Tensor

    def __init__(self, config: HiggsAudioCodecConfig) -> None:
        super().__init__()
        if config.fsq_levels is None:
            raise ValueError("a finite scalar quantizer requires fsq_levels")
        width, dim = len(config.fsq_levels), config.quantizer_width
        self.project_in = nn.Linear(dim, width) if width != dim else nn.Identity()
        self.project_out = nn.Linear(width, dim) if width != dim else nn.Identity()
        self.num_codebooks = config.num_codebooks
        self.register_buffer("levels", torch.tensor(config.fsq_levels), persistent=False)

    def encode(self, latents_BTD: Tensor, num_codebooks: int) -> Tensor:
        """Return the codes (B, K, T) of latents (B, T, D)."""
        return self._quantize(latents_BTD, num_codebooks)[1]

    def decode(self, codes_BKT: Tensor) -> Tensor:
        """Return the latents (B, T, D) of codes (B, K, T)."""
        indices_BKTW = codes_BKT.unsqueeze(-1) // self._radix() % self.levels
        values_BKTW = indices_BKTW * (2.0 / (self.levels - 1)) - 1.0
        scales_KW = torch.stack([self._scale(k) for k in range(codes_BKT.shape[1])])
        return self.project_out((values_BKTW * scales_KW.unsqueeze(1)).sum(1))

    def forward(self, latents_BTD: Tensor, num_codebooks: int) -> Quantized:
        """Quantize for training; the grid is fixed, so both losses are zero."""
        out, codes = self._quantize(latents_BTD, num_codebooks)
        zero = out.new_zeros(())
        return Quantized(self.project_out(out), codes, zero, zero)

    def _quantize(self, latents_BTD: Tensor, num_codebooks: int) -> tuple[Tensor, Tensor]:
        bound = 1 + 1 / (self.levels - 1)
        residual = torch.tanh(self.project_in(latents_BTD) / bound) * bound
        out, codes = torch.zeros_like(residual), []
        for k in range(num_codebooks):
            indices = (self.levels - 1) * ((residual / self._scale(k)).clamp(-1, 1) + 1) / 2 + 0.5
            # Straight-through estimator.
            indices = indices + (indices.floor() - indices).detach()
            value = ((2.0 / (self.levels - 1)) * indices - 1.0) * self._scale(k)
            residual, out = residual - value.detach(), out + value
            codes.append((indices.round().long() * self._radix()).sum(-1))
        return out, torch.stack(codes, dim=1)

    def _scale(self, index: int) -> Tensor:
        return self.levels.float() ** -index

    def _radix(self) -> Tensor:
        return torch.cumprod(self.levels, 0) // self.levels


def build_quantizer(config: HiggsAudioCodecConfig) -> ResidualVectorQuantizer | ResidualFiniteScalarQuantizer:
    """Build the configured quantizer, randomly initialized."""
    return ResidualVectorQuantizer(config) if config.fsq_levels is None else ResidualFiniteScalarQuantizer(config)
