"""The codec, learning from recordings: one step at a time, and the same steps after a restart.

In: a codec, settings, recordings at its rate. Out: losses of each step, and the codec itself, better. What a step does
depends on the settings, its number and the state alone: crops are drawn by number, codes are revived by a generator
whose state is kept.

A training has three stages. For `warmup_steps` the codec is an autoencoder: nothing is quantized. Then codebooks are
fitted to its latents by k-means, and everything learns. From `decoder_from` on what decides codes stands still, so that a
language model may already learn the codes while the decoder goes on.

The semantic model takes no part (it never learns); a random one, as small codecs made here have, is a fixed mixture of
filters, and asks of the codes only that they can tell its outputs apart. Knows no files but its own state's.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from higgs_model.codec.codec import HiggsAudioCodec
from higgs_model.codec.losses import CodecLoss, CodecLosses, LossWeights
from higgs_model.codec.quantizer import EuclideanCodebook, ResidualVectorQuantizer
from higgs_model.errors import BadConfig
from higgs_model.training.recordings import Recordings

_VECTORS_A_CODE = 16
"""That k-means gets, of each codebook."""
_DECIDES_CODES = ("acoustic_encoder", "encoder_semantic", "fc", "quantizer")


@dataclasses.dataclass(frozen=True)
class CodecTraining:
    """How a codec is trained.

    Attributes:
        steps: in all.
        warmup_steps: of them, without quantization.
        decoder_from: first step in which only the decoders learn; None: never.
        crop_frames, batch_size: what a step hears.
        learning_rate: at the top; it rises over `rise_steps` and falls along a cosine to `final_share` of itself at the end.
        unquantized: share of the rows that skip the quantizer after the warm-up too.
        coarse: share of the steps that use one of the smaller bandwidths.
        dead_below: a code is revived when it draws less than this share of what it would if all drew alike.
    """

    steps: int
    warmup_steps: int = 0
    decoder_from: int | None = None
    crop_frames: int = 16
    batch_size: int = 8
    learning_rate: float = 1e-3
    rise_steps: int = 50
    final_share: float = 0.05
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = 0.01
    clip_norm: float = 10.0
    unquantized: float = 0.0
    coarse: float = 0.0
    dead_below: float = 0.05
    seed: int = 0
    weights: LossWeights = LossWeights()

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        rise = min((step + 1) / max(self.rise_steps, 1), 1.0)
        fall = 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))
        return self.learning_rate * rise * (self.final_share + (1 - self.final_share) * fall)


class CodecTrainer:
    """A codec on its way.

    Attributes:
        step: how many steps have been made.
    """

    def __init__(self, codec: HiggsAudioCodec, settings: CodecTraining, recordings: Recordings) -> None:
        if not isinstance(codec.quantizer, ResidualVectorQuantizer) and settings.warmup_steps:
            raise BadConfig("codec training: warmup_steps needs a vector quantizer; a finite scalar one has nothing to fit.")
        self.codec, self.settings, self._recordings = codec.train(), settings, recordings
        self.step = 0
        self._judge = CodecLoss(codec.sample_rate, settings.weights).to(codec.device)
        learners = [parameter for parameter in codec.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            learners, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self._generator_state = torch.Generator().manual_seed(settings.seed).get_state()
        vectors = settings.batch_size * settings.crop_frames
        for book in self._books():
            book.dead_below = settings.dead_below * vectors / codec.codebook_size

    def _books(self) -> Iterator[EuclideanCodebook]:
        for module in self.codec.quantizer.modules():
            if isinstance(module, EuclideanCodebook):
                yield module

    def run_step(self) -> CodecLosses:
        """One step; its losses, before it."""
        settings, step = self.settings, self.step
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._generator_state)
            self._change_stage()
            losses = self._pass()
            self._generator_state = torch.get_rng_state()
        if not torch.isfinite(losses.total):
            raise FloatingPointError(f"codec training: the loss of step {step} is {losses.total.item()}.")
        for group in self._optimizer.param_groups:
            group["lr"] = settings.rate(step)
        self._optimizer.zero_grad()
        losses.total.backward()
        nn.utils.clip_grad_norm_(self.codec.parameters(), settings.clip_norm)
        self._optimizer.step()
        self.step += 1
        return losses

    def _pass(self) -> CodecLosses:
        settings, config = self.settings, self.codec.config
        crop_samples = settings.crop_frames * config.hop_samples
        samples_BN = self._recordings.crops(settings.batch_size, crop_samples, settings.seed, self.step)
        samples_BN = samples_BN.to(self.codec.device)
        whole = self.step < settings.warmup_steps
        skips_B = torch.rand(settings.batch_size) < (1.0 if whole else settings.unquantized)
        kbps = config.target_bandwidths_kbps
        coarse = torch.rand(()) < settings.coarse and not whole
        bandwidth = kbps[int(torch.randint(len(kbps), ()))] if coarse else None
        output = self.codec(samples_BN, bandwidth, skips_B.to(self.codec.device))
        if whole:
            # Codebooks that decide nothing must not pull at the encoder.
            nothing = output.commitment_loss.detach() * 0
            output = dataclasses.replace(output, commitment_loss=nothing, codebook_loss=nothing)
        return self._judge(output, samples_BN)

    def _change_stage(self) -> None:
        settings = self.settings
        if self.step == settings.warmup_steps and isinstance(self.codec.quantizer, ResidualVectorQuantizer):
            self.codec.quantizer.fit(self._some_latents())
        if settings.decoder_from is not None and self.step >= settings.decoder_from:
            for name in _DECIDES_CODES:
                self.codec.get_submodule(name).requires_grad_(False).eval()

    @torch.no_grad()
    def _some_latents(self) -> torch.Tensor:
        """Latents (N, D) of recordings, enough for k-means."""
        settings, config = self.settings, self.codec.config
        passes = -(-_VECTORS_A_CODE * config.codebook_size // (settings.batch_size * settings.crop_frames))
        found = []
        for number in range(passes):
            crop_samples = settings.crop_frames * config.hop_samples
            crops = self._recordings.crops(settings.batch_size, crop_samples, settings.seed + 1, number)
            found.append(self.codec.latents(crops.to(self.codec.device))[0].flatten(0, 1))
        return torch.cat(found)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, beside settings and recordings."""
        return {
            "step": self.step,
            "codec": self.codec.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator_state,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.step, self._generator_state = state["step"], state["generator"]
        self.codec.load_state_dict(state["codec"])
        self._optimizer.load_state_dict(state["optimizer"])

    def save(self, path: Path) -> None:
        """Write the state; the file is whole or the one before it."""
        unfinished = path.with_suffix(".part")
        torch.save(self.state(), unfinished)
        os.replace(unfinished, path)

    def resume(self, path: Path) -> bool:
        """Go on from a saved state, if there is one."""
        if path.exists():
            self.load_state(torch.load(path, map_location=self.codec.device, weights_only=True))
        return path.exists()
