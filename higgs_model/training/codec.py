"""The codec, learning from recordings: one step at a time, and the same steps after a restart.

In: a codec, settings, recordings at its rate. Out: losses of each step, and the codec itself, better. What a step does
depends on the settings, its number and the state alone: crops are drawn by number, codes are revived by a generator
whose state is kept.

A training has three stages. First codebooks are fitted, by k-means, to the log spectra of the recordings (`analysis`),
and for `taught_steps` the encoder learns to give these spectra as latents, the decoder what they sound like after
quantization: two tasks that do not wait for each other. Then everything learns together, as codecs are usually trained.
From `decoder_from` on what decides codes stands still, so that a language model may already learn the codes while the
decoder goes on.

A semantic model that was loaded never learns. One that is made from nothing has nobody to learn from but, with
`teach_semantic`, the same log spectra, in the taught steps, as a second ear beside the acoustic encoder; then it stands
still as well. Knows no files but its own state's.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs_model.codec.codec import HiggsAudioCodec
from higgs_model.codec.losses import CodecLoss, CodecLosses, LossWeights
from higgs_model.codec.quantizer import EuclideanCodebook, ResidualVectorQuantizer
from higgs_model.errors import BadConfig
from higgs_model.training.analysis import Analysis
from higgs_model.training.recordings import Recordings

_DECIDES_CODES = ("semantic_model", "acoustic_encoder", "encoder_semantic", "fc", "quantizer")


@dataclasses.dataclass(frozen=True)
class CodecTraining:
    """How a codec is trained.

    Attributes:
        steps: in all.
        taught_steps: of them, apart for encoder and decoder.
        taught: weight of how far the latents are from the log spectra.
        teach_semantic: the semantic model learns in the taught steps.
        decoder_from: first step in which only the decoders learn; None: never.
        crop_frames, batch_size: what a step hears.
        learning_rate: at the top; it rises over `rise_steps` and falls along a cosine to `final_share` of itself.
        coarse: share of the steps that use one of the smaller bandwidths.
        floor, shortest_window: of `CodecLoss`.
        analysed_s: seconds of sound, by whose log spectra latents and codes are chosen.
        dead_below: a code is revived when it draws less than this share of what it would if all drew alike.
    """

    steps: int
    taught_steps: int = 0
    taught: float = 1.0
    teach_semantic: bool = False
    decoder_from: int | None = None
    crop_frames: int = 16
    batch_size: int = 8
    learning_rate: float = 1e-3
    rise_steps: int = 50
    final_share: float = 0.05
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = 0.01
    clip_norm: float = 10.0
    coarse: float = 0.0
    dead_below: float = 0.05
    analysed_s: int = 1000
    seed: int = 0
    weights: LossWeights = LossWeights()
    floor: float = 1e-5
    shortest_window: int = 32

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        rise = min((step + 1) / max(self.rise_steps, 1), 1.0)
        fall = 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))
        return self.learning_rate * rise * (self.final_share + (1 - self.final_share) * fall)


class CodecTrainer:
    """A codec on its way.

    Args:
        state: of a training that is gone on with, if the file is there; else codes are fitted to the recordings.

    Attributes:
        step: how many steps have been made.
    """

    def __init__(
        self, codec: HiggsAudioCodec, settings: CodecTraining, recordings: Recordings, state: Path | None = None
    ) -> None:
        if not isinstance(codec.quantizer, ResidualVectorQuantizer) and settings.taught_steps:
            raise BadConfig(
                "codec training: taught_steps needs a vector quantizer; a finite scalar one has nothing to fit."
            )
        self.codec, self.settings, self._recordings = codec.train(), settings, recordings
        self.step = 0
        self._judge = CodecLoss(
            codec.sample_rate, settings.weights, floor=settings.floor, shortest_window=settings.shortest_window
        ).to(codec.device)
        codec.semantic_model.requires_grad_(settings.teach_semantic)
        learners = [parameter for parameter in codec.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            learners, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self._generator_state = torch.Generator().manual_seed(settings.seed).get_state()
        vectors = settings.batch_size * settings.crop_frames
        for book in self._books():
            book.dead_below = settings.dead_below * vectors / codec.codebook_size
        if state is not None and state.exists():
            width = codec.config.quantizer_width
            self._analysis = Analysis(codec.sample_rate, codec.hop_samples, width).to(codec.device)
            self.load_state(torch.load(state, map_location=codec.device, weights_only=True))
        else:
            self._analysis = self._fitted()

    def _fitted(self) -> Analysis:
        """How log spectra become latents; where encoder and decoder are taught apart, also what the codes are."""
        settings, codec = self.settings, self.codec
        many = self._recordings.crops(settings.analysed_s, codec.sample_rate, settings.seed + 1, 0).to(codec.device)
        analysis = Analysis.fitted(codec.sample_rate, codec.hop_samples, codec.config.quantizer_width, many)
        if settings.taught_steps and isinstance(codec.quantizer, ResidualVectorQuantizer):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                codec.quantizer.fit(analysis(many).flatten(0, 1))
        return analysis

    def _books(self) -> Iterator[EuclideanCodebook]:
        for module in self.codec.quantizer.modules():
            if isinstance(module, EuclideanCodebook):
                yield module

    def run_step(self) -> tuple[CodecLosses, Tensor]:
        """One step; its losses before it, and how far latents are from what they were taught."""
        settings, step = self.settings, self.step
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._generator_state)
            self._change_stage()
            losses, distance = self._pass()
            self._generator_state = torch.get_rng_state()
        if not torch.isfinite(losses.total):
            raise FloatingPointError(f"codec training: the loss of step {step} is {losses.total.item()}.")
        for group in self._optimizer.param_groups:
            group["lr"] = settings.rate(step)
        self._optimizer.zero_grad()
        (losses.total + settings.taught * distance).backward()
        nn.utils.clip_grad_norm_(self.codec.parameters(), settings.clip_norm)
        self._optimizer.step()
        self.step += 1
        return losses, distance.detach()

    def _pass(self) -> tuple[CodecLosses, Tensor]:
        """Losses of the step, and how far its latents are from what they were first taught."""
        settings = self.settings
        samples_BN = self._crops(settings.seed, self.step)
        goal_BTD = self._analysis(samples_BN)
        if self.step < settings.taught_steps:
            latents_BTD, features_BTD = self.codec.latents(samples_BN)
            with torch.no_grad():
                num_codebooks, quantizer = self.codec.config.codebooks_for(self._bandwidth()), self.codec.quantizer
                heard_BTD = quantizer.decode(quantizer.encode(goal_BTD, num_codebooks))
            output = self.codec.from_latents(heard_BTD, features_BTD)
            return self._judge(output, samples_BN), F.smooth_l1_loss(latents_BTD, goal_BTD)
        output = self.codec(samples_BN, self._bandwidth())
        return self._judge(output, samples_BN), F.smooth_l1_loss(output.latents, goal_BTD)

    def _bandwidth(self) -> float | None:
        kbps = self.codec.config.target_bandwidths_kbps
        coarse = torch.rand(()) < self.settings.coarse
        return kbps[int(torch.randint(len(kbps), ()))] if coarse else None

    def _crops(self, seed: int, number: int) -> Tensor:
        settings = self.settings
        num_samples = settings.crop_frames * self.codec.hop_samples
        return self._recordings.crops(settings.batch_size, num_samples, seed, number).to(self.codec.device)

    def _change_stage(self) -> None:
        settings = self.settings
        if self.step >= settings.taught_steps:
            self.codec.semantic_model.requires_grad_(False)
        if settings.decoder_from is not None and self.step >= settings.decoder_from:
            for name in _DECIDES_CODES:
                self.codec.get_submodule(name).requires_grad_(False).eval()

    @torch.no_grad()
    def taught_codes(self, samples_N: Tensor) -> Tensor:
        """The codes (K, T) that the decoder was taught to speak for a recording, which the encoder only comes near."""
        whole = F.pad(samples_N, (0, -len(samples_N) % self.codec.hop_samples))
        return self.codec.quantizer.encode(self._analysis(whole[None]), self.codec.num_codebooks)[0]

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, beside settings and crops of the recordings."""
        return {
            "step": self.step,
            "codec": self.codec.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator_state,
            "analysis": self._analysis.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.step, self._generator_state = state["step"], state["generator"]
        self.codec.load_state_dict(state["codec"])
        self._optimizer.load_state_dict(state["optimizer"])
        # Other recordings would be analysed otherwise, and codes would mean something else.
        self._analysis.load_state_dict(state["analysis"])

    def save(self, path: Path) -> None:
        """Write the state; the file is whole or the one before it."""
        unfinished = path.with_suffix(".part")
        torch.save(self.state(), unfinished)
        os.replace(unfinished, path)
