"""Configuration of the codec, and its conversion from and to both checkpoint layouts.

In: the parsed `config.json` of a checkpoint, the semantic model's configuration, and the shapes of the tensors, because
the original layout does not store all widths. Out: a frozen `HiggsAudioCodecConfig`, or `BadConfig` naming the key.
Derived values are properties.

Does not depend on files or modules.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import HubertConfig, PretrainedConfig, WavLMConfig

from higgs_model.errors import BadConfig

SEMANTIC_STRIDE_SAMPLES = 320
"""Samples per feature of HuBERT and WavLM."""
SEMANTIC_CONFIGS: dict[str, type[PretrainedConfig]] = {"hubert": HubertConfig, "wavlm": WavLMConfig}
_SEMANTIC_TEACHERS = {"hubert_base": "hubert", "hubert_base_general": "hubert", "wavlm_base_plus": "wavlm"}
_DOWNSAMPLE_MODES = ("step_down", "avg")


@dataclasses.dataclass(frozen=True)
class HiggsAudioCodecConfig:
    """Configuration of the codec; the defaults are those of the published codec (24 kHz, 25 frames per second)."""

    sample_rate_hz: int = 24_000
    ratios: tuple[int, ...] = (8, 5, 4, 2, 3)
    """Strides of the encoder blocks, and of the decoder blocks in the same order."""
    num_codebooks: int = 8
    codebook_size: int = 1024
    codebook_dim: int | None = 64
    """Width of the codebook vectors; None: that of the quantizer."""
    fsq_levels: tuple[int, ...] | None = None
    """Levels per dimension of a residual finite scalar quantizer; None: residual vector quantization."""
    target_bandwidths_kbps: tuple[float, ...] = (0.5, 1, 1.5, 2)
    acoustic_dim: int = 256
    encoder_channels: int = 64
    decoder_channels: int = 1024
    quantizer_dim: int | None = None
    """Width of the quantizer's input; None: acoustic and semantic latents concatenated."""
    semantic: PretrainedConfig = dataclasses.field(default_factory=HubertConfig)
    semantic_dim: int | None = None
    """Channels of the semantic latents; None: the semantic model's hidden size."""
    semantic_sample_rate_hz: int = 16_000
    semantic_downsampling: str = "step_down"
    """Downsampling of semantic features to the frame rate: `step_down` keeps every n-th, `avg` averages n."""

    def __post_init__(self) -> None:
        if self.fsq_levels is not None:
            object.__setattr__(self, "codebook_size", math.prod(self.fsq_levels))
            object.__setattr__(self, "codebook_dim", len(self.fsq_levels))
        self._validate()

    def _validate(self) -> None:
        counts = {
            name: getattr(self, name)
            for name in (
                "sample_rate_hz",
                "num_codebooks",
                "acoustic_dim",
                "encoder_channels",
                "decoder_channels",
            )
        } | {"codebook_size": self.codebook_size - 1, "ratios": min(self.ratios, default=0)}
        for name, count in counts.items():
            if count < 1:
                raise BadConfig(f"codec configuration: {name} is {getattr(self, name)}, which is too small.")
        if self.semantic.model_type not in SEMANTIC_CONFIGS:
            raise BadConfig(
                f"codec configuration: the semantic model's type is {self.semantic.model_type!r}; "
                f"expected one of {', '.join(SEMANTIC_CONFIGS)}."
            )
        if self.semantic_downsampling not in _DOWNSAMPLE_MODES:
            raise BadConfig(
                f"codec configuration: semantic downsampling is {self.semantic_downsampling!r}; "
                f"expected one of {', '.join(_DOWNSAMPLE_MODES)}."
            )
        if self.semantic_downsample_factor < 1:
            raise BadConfig(
                f"codec configuration: a frame of {self.hop_samples} samples at {self.sample_rate_hz} Hz is shorter "
                f"than one semantic feature ({SEMANTIC_STRIDE_SAMPLES} samples at {self.semantic_sample_rate_hz} Hz)."
            )

    @property
    def hop_samples(self) -> int:
        """Samples per frame."""
        return math.prod(self.ratios)

    @property
    def frame_rate_hz(self) -> int:
        """Frames per second, rounded up, as in the bandwidth arithmetic."""
        return math.ceil(self.sample_rate_hz / self.hop_samples)

    @property
    def semantic_width(self) -> int:
        """Channels of the semantic latents."""
        return self.semantic.hidden_size if self.semantic_dim is None else self.semantic_dim

    @property
    def latent_width(self) -> int:
        """Channels of the acoustic and semantic latents concatenated."""
        return self.acoustic_dim + self.semantic_width

    @property
    def quantizer_width(self) -> int:
        return self.latent_width if self.quantizer_dim is None else self.quantizer_dim

    @property
    def codebook_width(self) -> int:
        """Width of the codebook vectors."""
        return self.quantizer_width if self.codebook_dim is None else self.codebook_dim

    @property
    def semantic_downsample_factor(self) -> int:
        """Semantic features per frame."""
        features = self.hop_samples * self.semantic_sample_rate_hz / self.sample_rate_hz / SEMANTIC_STRIDE_SAMPLES
        return int(features)

    @property
    def codebook_kbps(self) -> float:
        """Bandwidth of one codebook."""
        return math.log2(self.codebook_size) * self.frame_rate_hz / 1000

    def num_codebooks_for(self, bandwidth_kbps: float | None) -> int:
        """Return the number of codebooks that fit a target bandwidth; None: all."""
        if bandwidth_kbps is None:
            return self.num_codebooks
        if bandwidth_kbps not in self.target_bandwidths_kbps:
            raise BadConfig(
                f"bandwidth {bandwidth_kbps} kbps is not one of this codec's target bandwidths "
                f"({', '.join(str(kbps) for kbps in self.target_bandwidths_kbps)})."
            )
        return min(max(int(bandwidth_kbps / self.codebook_kbps), 1), self.num_codebooks)


Shapes = Mapping[str, Sequence[int]]

_ORIGINAL_DEFAULTS: dict[str, Any] = {
    "D": 128,
    "target_bandwidths": [1, 1.5, 2, 4, 6],
    "ratios": [8, 5, 4, 2],
    "sample_rate": 16_000,
    "bins": 1024,
    "n_q": 8,
    "codebook_dim": None,
    "semantic_techer": "hubert_base_general",
    "downsample_mode": "step_down",
    "vq_scale": 1,
    "semantic_sample_rate": None,
}
_ORIGINAL_UNUSED = {
    "n_filters",
    "normalize",
    "causal",
    "last_layer_semantic",
    "merge_mode",
    "semantic_mode",
    "device",
}
"""Keys that the reference implementation accepts and ignores."""
_METADATA = {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path"}


def from_original(raw: Mapping[str, Any], semantic: PretrainedConfig | None, shapes: Shapes) -> HiggsAudioCodecConfig:
    """Parse the original layout's `config.json`.

    Args:
        raw: the parsed file; its keys are the constructor arguments of the reference implementation, with the same
            defaults.
        semantic: configuration of the semantic model; None: the base model named by `semantic_techer`.
        shapes: tensor shapes by original name, from which the encoder, decoder and semantic widths are inferred.
    """
    for key in raw:
        if key not in _ORIGINAL_DEFAULTS.keys() | _ORIGINAL_UNUSED | _METADATA:
            guess = difflib.get_close_matches(key, _ORIGINAL_DEFAULTS, n=1)
            hint = f"; did you mean {guess[0]!r}?" if guess else "."
            raise BadConfig(f"codec config.json: unknown key {key!r}{hint}")
    values = _ORIGINAL_DEFAULTS | dict(raw)
    teacher = values["semantic_techer"]
    if teacher not in _SEMANTIC_TEACHERS:
        raise BadConfig(
            f"codec config.json: semantic_techer is {teacher!r}; expected one of {', '.join(_SEMANTIC_TEACHERS)}."
        )
    bins = values["bins"]
    semantic_dim = shapes["encoder_semantic.conv.conv.weight"][0]
    return HiggsAudioCodecConfig(
        sample_rate_hz=values["sample_rate"],
        ratios=tuple(values["ratios"]),
        num_codebooks=values["n_q"],
        codebook_size=bins if isinstance(bins, int) else math.prod(bins),
        codebook_dim=values["codebook_dim"],
        fsq_levels=None if isinstance(bins, int) else tuple(bins),
        target_bandwidths_kbps=tuple(values["target_bandwidths"]),
        acoustic_dim=values["D"],
        encoder_channels=shapes["encoder.block.0.bias"][0],
        decoder_channels=shapes["decoder_2.model.0.bias"][0],
        quantizer_dim=(values["D"] + semantic_dim) // values["vq_scale"],
        semantic=semantic or SEMANTIC_CONFIGS[_SEMANTIC_TEACHERS[teacher]](),
        semantic_dim=semantic_dim,
        semantic_sample_rate_hz=values["semantic_sample_rate"] or 16_000,
        semantic_downsampling=values["downsample_mode"],
    )


def to_original(config: HiggsAudioCodecConfig) -> dict[str, Any]:
    """Return the original layout's `config.json`; the semantic model's configuration is a separate file."""
    teacher = {"hubert": "hubert_base_general", "wavlm": "wavlm_base_plus"}[config.semantic.model_type]
    scale = config.latent_width // config.quantizer_width
    if scale == 0 or config.latent_width // scale != config.quantizer_width:
        raise BadConfig(f"the original layout cannot represent a quantizer of width {config.quantizer_width}.")
    return {
        "D": config.acoustic_dim,
        "target_bandwidths": list(config.target_bandwidths_kbps),
        "ratios": list(config.ratios),
        "sample_rate": config.sample_rate_hz,
        "bins": config.codebook_size if config.fsq_levels is None else list(config.fsq_levels),
        "n_q": config.num_codebooks,
        "codebook_dim": config.codebook_dim,
        "semantic_techer": teacher,
        "downsample_mode": config.semantic_downsampling,
        "vq_scale": scale,
        "semantic_sample_rate": config.semantic_sample_rate_hz,
    }


_PORT_FIXED: dict[str, Any] = {
    "kernel_size": 3,
    "channel_ratios": [1, 1],
    "strides": [1, 1],
    "block_dilations": [1, 1],
    "unit_kernel_size": 3,
    "downsample_factor": SEMANTIC_STRIDE_SAMPLES,
}
"""Options of transformers' network that are fixed in the reference implementation."""


def from_transformers(raw: Mapping[str, Any], num_codebooks: int) -> HiggsAudioCodecConfig:
    """Parse the transformers layout's `config.json`.

    Args:
        raw: the parsed file.
        num_codebooks: number of codebooks in the checkpoint; the file only implies it by its last target bandwidth.
    """
    for key, required in _PORT_FIXED.items():
        value = raw.get(key, required)
        if (list(value) if isinstance(value, list | tuple) else value) != required:
            raise BadConfig(f"codec config.json: {key} is {value}; Higgs Audio's network requires {required}.")
    acoustic = raw.get("acoustic_model_config") or {}
    ratios = tuple(acoustic.get("downsampling_ratios", (8, 5, 4, 2)))
    upsampling = tuple(acoustic.get("upsampling_ratios", ratios))
    if upsampling != ratios:
        raise BadConfig(f"codec config.json: the decoder's ratios {upsampling} differ from the encoder's {ratios}.")
    return HiggsAudioCodecConfig(
        sample_rate_hz=raw.get("sample_rate", 24_000),
        ratios=ratios,
        num_codebooks=num_codebooks,
        codebook_size=raw.get("codebook_size", 1024),
        codebook_dim=raw.get("codebook_dim", 64),
        target_bandwidths_kbps=tuple(raw.get("target_bandwidths", (0.5, 1, 1.5, 2, 4))),
        acoustic_dim=acoustic.get("hidden_size", 256),
        encoder_channels=acoustic.get("encoder_hidden_size", 64),
        decoder_channels=acoustic.get("decoder_hidden_size", 1024),
        semantic=semantic_config(raw.get("semantic_model_config") or {}),
        semantic_sample_rate_hz=raw.get("semantic_sample_rate", 16_000),
    )


def to_transformers(config: HiggsAudioCodecConfig) -> dict[str, Any]:
    """Return the transformers layout's `config.json`.

    That layout derives the number of codebooks from the last target bandwidth, so the bandwidth of all codebooks comes
    last, and larger ones are omitted.
    """
    _check_representable(config)
    bits = math.ceil(math.log2(config.codebook_size))
    full_kbps = config.num_codebooks * config.frame_rate_hz * bits / 1000
    return _PORT_FIXED | {
        "architectures": ["HiggsAudioV2TokenizerModel"],
        "model_type": "higgs_audio_v2_tokenizer",
        "sample_rate": config.sample_rate_hz,
        "semantic_sample_rate": config.semantic_sample_rate_hz,
        "target_bandwidths": [kbps for kbps in config.target_bandwidths_kbps if kbps < full_kbps] + [full_kbps],
        "codebook_size": config.codebook_size,
        "codebook_dim": config.codebook_width,
        "acoustic_model_config": {
            "model_type": "dac",
            "encoder_hidden_size": config.encoder_channels,
            "decoder_hidden_size": config.decoder_channels,
            "hidden_size": config.acoustic_dim,
            "downsampling_ratios": list(config.ratios),
            "upsampling_ratios": list(config.ratios),
            "sampling_rate": config.sample_rate_hz,
        },
        "semantic_model_config": config.semantic.to_dict(),
    }


def _check_representable(config: HiggsAudioCodecConfig) -> None:
    unsupported = {
        "a finite scalar quantizer": config.fsq_levels is not None,
        f"a quantizer of width {config.quantizer_width}": config.quantizer_width != config.latent_width,
        f"semantic latents of width {config.semantic_width}": config.semantic_width != config.semantic.hidden_size,
        "averaged semantic features": config.semantic_downsampling != "step_down",
        "a codebook as wide as the quantizer": config.codebook_width == config.quantizer_width,
    }
    for feature, is_used in unsupported.items():
        if is_used:
            raise BadConfig(f"the transformers layout cannot represent {feature}; save in the original layout instead.")


def semantic_config(raw: Mapping[str, Any]) -> PretrainedConfig:
    """Return the configuration of a HuBERT (default) or WavLM with masking disabled, for frozen feature extraction."""
    model_type = raw.get("model_type", "hubert")
    if model_type not in SEMANTIC_CONFIGS:
        raise BadConfig(
            f"semantic model configuration: model_type is {model_type!r}; "
            f"expected one of {', '.join(SEMANTIC_CONFIGS)}."
        )
    values = {key: value for key, value in raw.items() if key != "model_type"}
    return SEMANTIC_CONFIGS[model_type](**values | {"mask_time_prob": 0.0, "mask_feature_prob": 0.0})
