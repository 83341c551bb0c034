"""Training of the codec, step by step, with deterministic resumption.

In: a codec, settings, recordings at its sample rate. Out: the losses of each step, and the trained codec. A step
depends on the settings, its number and the state only: crops are sampled by step number, and dead codes are replaced
with a generator whose state is saved.

Training has three stages. First, codebooks are initialized by k-means on log mel components of the recordings
(`log_mel_pca`), and for `taught_steps` encoder and decoder are trained separately: the encoder predicts these
components as latents, and the decoder decodes the quantized components. Then all parts are trained jointly, as is usual
for codecs. From `decoder_from` on everything that determines codes is frozen, so that a language model can be trained
on the codes while the decoder improves.

A pretrained semantic model is always frozen. A semantic model trained from scratch (`teach_semantic`) has the log mel
components as its targets: it is trained in the first stage, with the acoustic encoder, and then frozen. Reads and
writes no files except its own state.
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
from higgs_model.training.log_mel_pca import LogMelPCA
from higgs_model.training.recordings import Recordings

_ENCODING_MODULES = ("semantic_model", "acoustic_encoder", "encoder_semantic", "fc", "quantizer")


@dataclasses.dataclass(frozen=True)
class CodecTraining:
    """Settings of codec training.

    Attributes:
        steps: total number of steps.
        taught_steps: number of initial steps in which encoder and decoder are trained separately.
        taught: weight of the distance between the latents and the log mel components.
        teach_semantic: train the semantic model in the first `taught_steps`.
        decoder_from: first step in which only the decoders are trained; None: never.
        crop_frames, batch_size: length and number of the crops of a step.
        learning_rate: peak value, after linear warm-up over `rise_steps`; then cosine decay to the fraction
            `final_share`.
        coarse: fraction of steps with a random target bandwidth instead of all codebooks.
        floor, shortest_window: see `CodecLoss`.
        analysed_s: seconds of audio to fit the log mel components and the codebooks to.
        dead_below: a code is replaced if it is used less than this fraction of uniform usage.
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

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warmup = min((step + 1) / max(self.rise_steps, 1), 1.0)
        decay = 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))
        return self.learning_rate * warmup * (self.final_share + (1 - self.final_share) * decay)


class CodecTrainer:
    """Trains a codec.

    Args:
        codec: the codec to train, in place.
        settings: settings of the training.
        recordings: training data at the codec's sample rate.
        state: file of a saved state to resume from; if it does not exist, codes are initialized from the recordings.

    Attributes:
        step: number of completed steps.

    Raises:
        BadConfig: `taught_steps` with a quantizer other than vector quantization.
    """

    def __init__(
        self, codec: HiggsAudioCodec, settings: CodecTraining, recordings: Recordings, state: Path | None = None
    ) -> None:
        if not isinstance(codec.quantizer, ResidualVectorQuantizer) and settings.taught_steps:
            raise BadConfig(
                "codec training: taught_steps requires a vector quantizer; a finite scalar one has no codes to fit."
            )
        self.codec, self.settings, self._recordings = codec.train(), settings, recordings
        self.step = 0
        self._criterion = CodecLoss(
            codec.sample_rate, settings.weights, floor=settings.floor, shortest_window=settings.shortest_window
        ).to(codec.device)
        codec.semantic_model.requires_grad_(settings.teach_semantic)
        trainable = [parameter for parameter in codec.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            trainable, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self._generator_state = torch.Generator().manual_seed(settings.seed).get_state()
        vectors = settings.batch_size * settings.crop_frames
        for codebook in self._codebooks():
            codebook.dead_code_threshold = settings.dead_below * vectors / codec.codebook_size
        if state is not None and state.exists():
            width = codec.config.quantizer_width
            self._pca = LogMelPCA(codec.sample_rate, codec.hop_samples, width).to(codec.device)
            self.load_state(torch.load(state, map_location=codec.device, weights_only=True))
        else:
            self._pca = self._fit_pca()

    def _fit_pca(self) -> LogMelPCA:
        """Fit the log mel components, and with `taught_steps` also the quantizer."""
        settings, codec = self.settings, self.codec
        crops = self._recordings.crops(settings.analysed_s, codec.sample_rate, settings.seed + 1, 0).to(codec.device)
        pca = LogMelPCA.fit(codec.sample_rate, codec.hop_samples, codec.config.quantizer_width, crops)
        if settings.taught_steps and isinstance(codec.quantizer, ResidualVectorQuantizer):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                codec.quantizer.fit_to(pca(crops).flatten(0, 1))
        return pca

    def _codebooks(self) -> Iterator[EuclideanCodebook]:
        for module in self.codec.quantizer.modules():
            if isinstance(module, EuclideanCodebook):
                yield module

    def run_step(self) -> tuple[CodecLosses, Tensor]:
        """Run a step; return its losses and the distance between the latents and the log mel components.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        settings, step = self.settings, self.step
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._generator_state)
            self._freeze_for_stage()
            losses, distance = self._compute_losses()
            self._generator_state = torch.get_rng_state()
        if not torch.isfinite(losses.total):
            raise FloatingPointError(f"codec training: the loss of step {step} is {losses.total.item()}.")
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        self._optimizer.zero_grad()
        (losses.total + settings.taught * distance).backward()
        nn.utils.clip_grad_norm_(self.codec.parameters(), settings.clip_norm)
        self._optimizer.step()
        self.step += 1
        return losses, distance.detach()

    def _compute_losses(self) -> tuple[CodecLosses, Tensor]:
        """Return the step's losses and the distance between the latents and the log mel components."""
        settings = self.settings
        samples_BN = self._crops(settings.seed, self.step)
        target_BTD = self._pca(samples_BN)
        if self.step < settings.taught_steps:
            latents_BTD, features_BTD = self.codec.encode_latents(samples_BN)
            with torch.no_grad():
                num_codebooks, quantizer = self.codec.config.num_codebooks_for(self._bandwidth()), self.codec.quantizer
                quantized_BTD = quantizer.decode(quantizer.encode(target_BTD, num_codebooks))
            output = self.codec.decode_latents(quantized_BTD, features_BTD)
            return self._criterion(output, samples_BN), F.smooth_l1_loss(latents_BTD, target_BTD)
        output = self.codec(samples_BN, self._bandwidth())
        return self._criterion(output, samples_BN), F.smooth_l1_loss(output.latents, target_BTD)

    def _bandwidth(self) -> float | None:
        kbps = self.codec.config.target_bandwidths_kbps
        coarse = torch.rand(()) < self.settings.coarse
        return kbps[int(torch.randint(len(kbps), ()))] if coarse else None

    def _crops(self, seed: int, step: int) -> Tensor:
        settings = self.settings
        num_samples = settings.crop_frames * self.codec.hop_samples
        return self._recordings.crops(settings.batch_size, num_samples, seed, step).to(self.codec.device)

    def _freeze_for_stage(self) -> None:
        settings = self.settings
        if self.step >= settings.taught_steps:
            self.codec.semantic_model.requires_grad_(False)
        if settings.decoder_from is not None and self.step >= settings.decoder_from:
            for name in _ENCODING_MODULES:
                self.codec.get_submodule(name).requires_grad_(False).eval()

    @torch.no_grad()
    def target_codes(self, samples_N: Tensor) -> Tensor:
        """Return the target codes (K, T) of a recording, which the encoder approximates in the first stage."""
        padded_N = F.pad(samples_N, (0, -len(samples_N) % self.codec.hop_samples))
        return self.codec.quantizer.encode(self._pca(padded_N[None]), self.codec.num_codebooks)[0]

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on except settings and recordings."""
        return {
            "step": self.step,
            "codec": self.codec.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator_state,
            "analysis": self._pca.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.step, self._generator_state = state["step"], state["generator"]
        self.codec.load_state_dict(state["codec"])
        self._optimizer.load_state_dict(state["optimizer"])
        # Fitting to other recordings would change the meaning of the codes.
        self._pca.load_state_dict(state["analysis"])

    def save(self, path: Path) -> None:
        """Write the state to a file atomically."""
        draft = path.with_suffix(".part")
        torch.save(self.state(), draft)
        os.replace(draft, path)
