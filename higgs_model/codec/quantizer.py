"""The quantizers: latents (B, T, D) ↔ codes (B, K, T), residual by residual.

`ResidualVectorQuantizer`: each codebook projects what the ones before left over to a narrow width, takes the
nearest code there and projects back. `ResidualFiniteScalarQuantizer`: each rounds what is left to a grid that
is finer by its number of levels a step; there is nothing to learn but the projections.

Both compute in float32 whatever the rest of the codec does, because a code is a decision. In training,
gradients pass straight through the decision. Nothing here knows of samples or checkpoints; parameter names
are those of the transformers layout.
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
    """`latents` (B, T, D) as the decoder will see them, `codes` (B, K, T), and the losses of training (scalars).

    `commitment_loss` pulls the encoder towards its codes; `codebook_loss` pulls the codes towards the
    encoder, and is zero where codebooks follow by moving average or cannot move.
    """

    latents: Tensor
    codes: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor


class EuclideanCodebook(nn.Module):
    """The codes of one quantizer and the statistics by which they follow the data.

    `embed` (size, width); `cluster_size` (size,) and `embed_avg` (size, width) are moving averages of how
    many vectors, and their sum, each code has drawn; `inited` (1,) is 0 until the first training batch has
    seeded the codes. `learned_by_gradient` makes `embed` an ordinary parameter instead.
    """

    decay = 0.99
    dead_below = 2.0
    """A code that draws fewer vectors a batch than this, on a moving average, is replaced by one of the batch."""

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
    def learned_by_gradient(self) -> bool:
        return self.embed.requires_grad

    def nearest(self, vectors: Tensor) -> Tensor:
        """Index of the nearest code, (…, width) → (…,)."""
        flat = vectors.flatten(0, -2)
        codes = self.embed.t()
        distance = flat.square().sum(1, keepdim=True) - 2 * flat @ codes + codes.square().sum(0, keepdim=True)
        return distance.argmin(dim=1).view(vectors.shape[:-1])

    @torch.no_grad()
    def seed(self, vectors: Tensor) -> None:
        """Before the first step: codes are vectors of the batch."""
        if self.inited.item():
            return
        self.embed.copy_(_draw(vectors.flatten(0, -2), len(self.embed)))
        self.embed_avg.copy_(self.embed)
        self.cluster_size.fill_(self.dead_below)
        self.inited.fill_(1)

    @torch.no_grad()
    def fit(self, vectors_NW: Tensor, rounds: int) -> None:
        """Codes become centres of these vectors, by k-means; a centre that draws none becomes one of the vectors."""
        self.embed.copy_(_draw(vectors_NW, len(self.embed)))
        for _ in range(rounds):
            chosen_NC = F.one_hot(self.nearest(vectors_NW), len(self.embed)).to(vectors_NW.dtype)
            drawn_C = chosen_NC.sum(0)
            self.embed.copy_(chosen_NC.t() @ vectors_NW / drawn_C.clamp_min(1).unsqueeze(1))
            empty = drawn_C == 0
            self.embed[empty] = _draw(vectors_NW, int(empty.sum()))
        self.cluster_size.fill_(self.dead_below * 2)
        self.embed_avg.copy_(self.embed * self.dead_below * 2)
        self.inited.fill_(1)

    @torch.no_grad()
    def follow(self, vectors: Tensor, indices: Tensor) -> None:
        """Move the averages by one batch, then the codes (unless gradients move them), and revive dead ones."""
        flat, chosen = vectors.flatten(0, -2), F.one_hot(indices.flatten(), len(self.embed)).to(vectors.dtype)
        self.cluster_size.lerp_(chosen.sum(0), 1 - self.decay)
        if not self.learned_by_gradient:
            self.embed_avg.lerp_(chosen.t() @ flat, 1 - self.decay)
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + 1e-5) / (total + len(self.embed) * 1e-5) * total
            self.embed.copy_(self.embed_avg / smoothed.unsqueeze(1))
        dead = self.cluster_size < self.dead_below
        if dead.any():
            drawn = _draw(flat, int(dead.sum()))
            self.embed[dead] = drawn
            self.embed_avg[dead] = drawn * self.dead_below
            self.cluster_size[dead] = self.dead_below


def _draw(vectors: Tensor, count: int) -> Tensor:
    """`count` rows of (N, D), each at most once if there are enough."""
    if len(vectors) >= count:
        return vectors[torch.randperm(len(vectors), device=vectors.device)[:count]]
    return vectors[torch.randint(len(vectors), (count,), device=vectors.device)]


class VectorQuantizer(nn.Module):
    """One codebook between its two projections."""

    def __init__(self, dim: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        projects = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if projects else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if projects else nn.Identity()
        self.codebook = EuclideanCodebook(codebook_size, codebook_dim)

    def decode(self, indices_BT: Tensor) -> Tensor:
        """(B, T) → (B, T, D)."""
        return self.project_out(F.embedding(indices_BT, self.codebook.embed))

    def project_to_principal(self, vectors_ND: Tensor) -> None:
        """Make the narrow width the directions in which these vectors differ most."""
        inward, outward = self.project_in, self.project_out
        if not (isinstance(inward, nn.Linear) and isinstance(outward, nn.Linear)):
            # The codebook is as wide as what it codes.
            return
        mean_D = vectors_ND.mean(0)
        basis_DW = torch.linalg.eigh((vectors_ND - mean_D).t().cov()).eigenvectors[:, -len(inward.weight) :]
        inward.weight.copy_(basis_DW.t())
        inward.bias.copy_(-basis_DW.t() @ mean_D)
        outward.weight.copy_(basis_DW)
        outward.bias.copy_(mean_D)


class ResidualVectorQuantizer(nn.Module):
    """K vector quantizers, each working on what the ones before it left."""

    def __init__(self, config: HiggsAudioCodecConfig) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(
            VectorQuantizer(config.quantizer_width, config.codebook_size, config.codebook_width)
            for _ in range(config.num_codebooks)
        )

    def encode(self, latents_BTD: Tensor, num_codebooks: int) -> Tensor:
        """(B, T, D) → (B, K, T)."""
        residual, codes = latents_BTD, []
        for quantizer in self._first(num_codebooks):
            codes.append(quantizer.codebook.nearest(quantizer.project_in(residual)))
            residual = residual - quantizer.decode(codes[-1])
        return torch.stack(codes, dim=1)

    def decode(self, codes_BKT: Tensor) -> Tensor:
        """(B, K, T) → (B, T, D); fewer codebooks than there are give a coarser result."""
        first, *rest = zip(self._first(codes_BKT.shape[1]), codes_BKT.unbind(1), strict=True)
        latents = first[0].decode(first[1])
        for quantizer, indices in rest:
            latents = latents + quantizer.decode(indices)
        return latents

    def forward(self, latents_BTD: Tensor, num_codebooks: int) -> Quantized:
        """Quantize for training: codebooks follow the batch when in training mode."""
        residual, out = latents_BTD, torch.zeros_like(latents_BTD)
        codes, commitment, codebook = [], [], []
        for quantizer in self._first(num_codebooks):
            book, vectors = quantizer.codebook, quantizer.project_in(residual)
            if self.training:
                book.seed(vectors)
            indices = book.nearest(vectors)
            chosen = F.embedding(indices, book.embed)
            commitment.append(F.mse_loss(vectors, chosen.detach()))
            codebook.append(F.mse_loss(chosen, vectors.detach()) if book.learned_by_gradient else vectors.new_zeros(()))
            # Forward the code, backward the vector itself.
            quantized = quantizer.project_out(vectors + (chosen - vectors).detach())
            if self.training:
                book.follow(vectors, indices)
            residual, out = residual - quantized, out + quantized
            codes.append(indices)
        return Quantized(out, torch.stack(codes, dim=1), torch.stack(commitment).mean(), torch.stack(codebook).mean())

    @torch.no_grad()
    def fit(self, latents_ND: Tensor, rounds: int = 10) -> None:
        """Begin from latents of real sound: project to their principal components, and make k-means centres the codes.

        Args:
            latents_ND: (N, D) float32, some ten times as many as a codebook has codes.
            rounds: of k-means.
        """
        residual = latents_ND
        for quantizer in self._first(len(self.quantizers)):
            if isinstance(quantizer.project_in, nn.Linear):
                quantizer.project_to_principal(residual)
            vectors = quantizer.project_in(residual)
            quantizer.codebook.fit(vectors, rounds)
            residual = residual - quantizer.decode(quantizer.codebook.nearest(vectors))

    def _first(self, num_codebooks: int) -> list[VectorQuantizer]:
        return cast(list[VectorQuantizer], list(self.quantizers[:num_codebooks]))


class ResidualFiniteScalarQuantizer(nn.Module):
    """K roundings to a grid of `levels`, each finer than the one before by the number of levels.

    Dimension d of the grid has the values −1, −1 + 2/(L_d − 1), …, 1; a code is the mixed-radix number of the
    places on it, the first dimension counting fastest. This is the symmetric form
    (https://arxiv.org/abs/2411.19842) of today's vector-quantize-pytorch; releases before it used another
    grid.
    """

    levels: Tensor

    def __init__(self, config: HiggsAudioCodecConfig) -> None:
        super().__init__()
        if config.fsq_levels is None:
            raise ValueError("a finite scalar quantizer needs fsq_levels")
        width, dim = len(config.fsq_levels), config.quantizer_width
        self.project_in = nn.Linear(dim, width) if width != dim else nn.Identity()
        self.project_out = nn.Linear(width, dim) if width != dim else nn.Identity()
        self.num_codebooks = config.num_codebooks
        self.register_buffer("levels", torch.tensor(config.fsq_levels), persistent=False)

    def encode(self, latents_BTD: Tensor, num_codebooks: int) -> Tensor:
        """(B, T, D) → (B, K, T)."""
        return self._quantize(latents_BTD, num_codebooks)[1]

    def decode(self, codes_BKT: Tensor) -> Tensor:
        """(B, K, T) → (B, T, D)."""
        places_BKTW = codes_BKT.unsqueeze(-1) // self._radix() % self.levels
        values_BKTW = places_BKTW * (2.0 / (self.levels - 1)) - 1.0
        scales_KW = torch.stack([self._scale(k) for k in range(codes_BKT.shape[1])])
        return self.project_out((values_BKTW * scales_KW.unsqueeze(1)).sum(1))

    def forward(self, latents_BTD: Tensor, num_codebooks: int) -> Quantized:
        """Quantize for training; the grid cannot move, so both losses are zero."""
        out, codes = self._quantize(latents_BTD, num_codebooks)
        zero = out.new_zeros(())
        return Quantized(self.project_out(out), codes, zero, zero)

    def _quantize(self, latents_BTD: Tensor, num_codebooks: int) -> tuple[Tensor, Tensor]:
        bound = 1 + 1 / (self.levels - 1)
        residual = torch.tanh(self.project_in(latents_BTD) / bound) * bound
        out, codes = torch.zeros_like(residual), []
        for k in range(num_codebooks):
            places = (self.levels - 1) * ((residual / self._scale(k)).clamp(-1, 1) + 1) / 2 + 0.5
            # Forward the place on the grid, backward the distance itself.
            places = places + (places.floor() - places).detach()
            value = ((2.0 / (self.levels - 1)) * places - 1.0) * self._scale(k)
            residual, out = residual - value.detach(), out + value
            codes.append((places.round().long() * self._radix()).sum(-1))
        return out, torch.stack(codes, dim=1)

    def _scale(self, index: int) -> Tensor:
        return self.levels.float() ** -index

    def _radix(self) -> Tensor:
        return torch.cumprod(self.levels, 0) // self.levels


def build_quantizer(config: HiggsAudioCodecConfig) -> ResidualVectorQuantizer | ResidualFiniteScalarQuantizer:
    """The quantizer that the configuration names."""
    return ResidualVectorQuantizer(config) if config.fsq_levels is None else ResidualFiniteScalarQuantizer(config)
