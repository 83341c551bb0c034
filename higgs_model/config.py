"""Configuration of the network, in either checkpoint layout.

`HiggsAudioConfig` reads a `config.json` of the original layout (`model_type: higgs_audio`) or of the transformers
layout (`higgs_audio_v2`), and uses the names and defaults of the original. A contradiction raises `BadConfig` with the
two conflicting values. Nothing here loads weights or depends on the network's computation.
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import HiggsAudioV2Config, LlamaConfig, PreTrainedConfig

from higgs_model import tokens
from higgs_model.errors import BadConfig

ADAPTER_TYPES = ("stack", "dual_ffn", "dual_ffn_fast_forward")

# Llama-3.2-3B, the backbone of the published models.
_LLAMA_3_2_3B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


class HiggsAudioEncoderConfig(PreTrainedConfig):
    """Configuration of the Whisper-like audio tower of the understanding variant.

    Names and defaults follow the reference. Mel spectrograms must be `2 * max_source_positions` frames long.
    `scale_embedding` is stored but has no effect, as in the reference.
    """

    model_type = "higgs_audio_encoder"
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "encoder_layers"}

    num_mel_bins: int = 128
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    encoder_layerdrop: float = 0.0
    d_model: int = 1280
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_function: str = "gelu"
    activation_dropout: float = 0.0
    scale_embedding: bool = False
    init_std: float = 0.02
    max_source_positions: int = 1500
    pad_token_id: int | None = tokens.PAD_ID

    @property
    def num_mel_frames(self) -> int:
        """The required length of mel spectrograms, which the second convolution halves."""
        return 2 * self.max_source_positions

    def __post_init__(self, **kwargs: Any) -> None:
        _check_types(self)
        super().__post_init__(**kwargs)
        _check_divisible("encoder_attention_heads", self.encoder_attention_heads, "d_model", self.d_model)


class HiggsAudioConfig(PreTrainedConfig):
    """Configuration of a Higgs Audio network. Names and defaults follow the reference's understanding variant.

    Attributes:
        text_config: the Llama backbone. A dict is completed with `LlamaConfig`'s defaults; None is Llama-3.2-3B.
        audio_encoder_config: the audio tower; unused with `skip_audio_tower`.
        audio_adapter_type: `dual_ffn` adds a second FFN and second norms for audio positions to the layers in
            `audio_dual_ffn_layers`; `dual_ffn_fast_forward` also lets audio positions skip all other layers; `stack`
            is plain Llama.
        audio_ffn_hidden_size, audio_ffn_intermediate_size: stored but without effect, as in the reference: the audio
            FFN has the shape of the text FFN.
        audio_embed_avg: average a frame's embedding over codebooks instead of summing it.
        use_audio_out_embed_projector: apply a linear layer without bias to the embeddings of frames.
        use_audio_out_self_attention: dual-FFN layers attend among audio positions before the shared attention.
        encode_audio_in_tokens: recordings enter the prompt as codes.
        encode_whisper_embed: stored for code that builds prompts; the network has a tower unless `skip_audio_tower`.
        audio_codebook_size: number of codes of one codebook, without the two stream tokens.
        audio_delay_token_id: stored for the transformers layout, in which it marks the frames of an ending clip.
        use_text_head: False for a checkpoint without a text head, which generates audio only.
    """

    model_type = "higgs_audio"
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": LlamaConfig,
        "audio_encoder_config": HiggsAudioEncoderConfig,
    }

    text_config: Any = None
    audio_encoder_config: Any = None
    audio_tokenizer_config: Any = None
    audio_adapter_type: str = "stack"
    audio_embed_avg: bool = False
    audio_ffn_hidden_size: int = 4096
    audio_ffn_intermediate_size: int = 14336
    audio_dual_ffn_layers: list[int] | None = None
    audio_decoder_proj_num_layers: int = 0
    encode_whisper_embed: bool = True
    encode_audio_in_tokens: bool = False
    use_delay_pattern: bool = False
    skip_audio_tower: bool = False
    use_audio_out_embed_projector: bool = False
    use_audio_out_self_attention: bool = False
    use_rq_transformer: bool = False
    use_text_head: bool = True
    audio_num_codebooks: int = 12
    audio_codebook_size: int = 1024
    audio_stream_bos_id: int | None = None
    audio_stream_eos_id: int | None = None
    audio_bos_token: str = tokens.AUDIO_BOS
    audio_eos_token: str = tokens.AUDIO_EOS
    audio_out_bos_token: str = tokens.AUDIO_OUT_BOS
    audio_in_token: str = tokens.AUDIO_IN
    audio_out_token: str = tokens.AUDIO_OUT
    audio_in_token_idx: int = tokens.AUDIO_IN_ID
    audio_out_token_idx: int = tokens.AUDIO_OUT_ID
    audio_out_bos_token_id: int = tokens.AUDIO_OUT_BOS_ID
    audio_eos_token_id: int = tokens.AUDIO_EOS_ID
    audio_delay_token_id: int = tokens.AUDIO_DELAY_ID
    pad_token_id: int | None = tokens.PAD_ID
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        _check_types(self)
        self.text_config = _llama_config(self.text_config)
        self.audio_encoder_config = _encoder_config(self.audio_encoder_config)
        if self.audio_stream_bos_id is None:
            self.audio_stream_bos_id = tokens.stream_bos_id(self.audio_codebook_size)
        if self.audio_stream_eos_id is None:
            self.audio_stream_eos_id = tokens.stream_eos_id(self.audio_codebook_size)
        # This model family never ties heads and embeddings, whatever a config says.
        self.tie_word_embeddings = False
        super().__post_init__(**kwargs)
        _check_adapter(self)
        _check_codebooks(self)
        _check_vocabulary(self)

    @property
    def num_codebook_rows(self) -> int:
        """Rows of one codebook in the audio embedding and the audio head: its codes and two stream tokens."""
        return self.audio_codebook_size + tokens.NUM_STREAM_TOKENS

    def has_token(self, token_id: int) -> bool:
        """Return whether the vocabulary contains a special token; a small one may lack tokens that it never uses."""
        return 0 <= token_id < self.text_config.vocab_size

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the config dict as transformers does, with the transformers layout translated to the original."""
        values, unused = super().get_config_dict(*args, **kwargs)
        if values.get("model_type") == HiggsAudioV2Config.model_type:
            values = from_transformers_layout(values)
        return values, unused


# The fields of `HiggsAudioV2Config` that describe its Llama backbone.
_BACKBONE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "bos_token_id",
)

# Values that the transformers layout implies for fields of `HiggsAudioConfig` and cannot change.
_FIXED_IN_TRANSFORMERS_LAYOUT: dict[str, Any] = {
    "audio_adapter_type": "dual_ffn",
    "audio_embed_avg": False,
    "skip_audio_tower": True,
    "encode_whisper_embed": False,
    "encode_audio_in_tokens": True,
    "use_delay_pattern": True,
    "use_audio_out_embed_projector": False,
    "use_audio_out_self_attention": False,
}

# Fields that `HiggsAudioV2Config` does not define, stored in its file so that a round trip preserves them.
_EXTRA_IN_TRANSFORMERS_LAYOUT = ("audio_in_token_idx", "audio_eos_token_id")


def from_transformers_layout(values: dict[str, Any]) -> dict[str, Any]:
    """Translate a `higgs_audio_v2` config dict to the original layout. The checkpoint determines `use_text_head`."""
    config = HiggsAudioV2Config(**{k: v for k, v in values.items() if k != "model_type"})
    return {
        **_FIXED_IN_TRANSFORMERS_LAYOUT,
        "model_type": HiggsAudioConfig.model_type,
        "text_config": {name: getattr(config, name) for name in _BACKBONE_FIELDS},
        "audio_dual_ffn_layers": list(range(config.num_hidden_layers)),
        "audio_num_codebooks": config.num_codebooks,
        "audio_codebook_size": config.codebook_size - tokens.NUM_STREAM_TOKENS,
        "audio_stream_bos_id": config.audio_stream_bos_id,
        "audio_stream_eos_id": config.audio_stream_eos_id,
        "audio_out_token_idx": config.audio_token_id,
        "audio_out_bos_token_id": config.audio_bos_token_id,
        "audio_delay_token_id": config.audio_delay_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "dtype": values.get("dtype", values.get("torch_dtype")),
        **{name: values[name] for name in _EXTRA_IN_TRANSFORMERS_LAYOUT if name in values},
    }


def to_transformers_layout(config: HiggsAudioConfig) -> HiggsAudioV2Config:
    """Return the configuration of the same network as a `HiggsAudioV2Config`.

    Raises:
        BadConfig: this layout cannot express the network.
    """
    num_layers = config.text_config.num_hidden_layers
    all_dual = len(config.audio_dual_ffn_layers or ()) == num_layers
    for name, expected in _FIXED_IN_TRANSFORMERS_LAYOUT.items():
        if name.startswith("encode_"):
            continue  # this layout does not define how recordings enter a prompt
        if name == "audio_adapter_type" and all_dual and config.audio_adapter_type != "stack":
            continue  # without a layer to skip, fast-forward is the same network
        if (found := getattr(config, name)) != expected:
            raise BadConfig(f"the transformers layout needs {name}={expected!r}, but this network has {found!r}")
    if not all_dual:
        raise BadConfig(
            f"the transformers layout needs all {num_layers} layers in audio_dual_ffn_layers, "
            f"but this network has {config.audio_dual_ffn_layers}"
        )
    return HiggsAudioV2Config(
        **{name: getattr(config.text_config, name) for name in _BACKBONE_FIELDS},
        num_codebooks=config.audio_num_codebooks,
        codebook_size=config.num_codebook_rows,
        audio_stream_bos_id=config.audio_stream_bos_id,
        audio_stream_eos_id=config.audio_stream_eos_id,
        audio_token_id=config.audio_out_token_idx,
        audio_bos_token_id=config.audio_out_bos_token_id,
        audio_delay_token_id=config.audio_delay_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=next(
            ids for ids in (config.eos_token_id, config.text_config.eos_token_id, tokens.EOT_ID) if ids is not None
        ),
        dtype=config.dtype,
        **{name: getattr(config, name) for name in _EXTRA_IN_TRANSFORMERS_LAYOUT},
    )


def to_original_layout(config: HiggsAudioConfig) -> dict[str, Any]:
    """Return a `config.json` dict for the reference implementation, with rope settings under their older names."""
    values: dict[str, Any] = config.to_dict()
    values["torch_dtype"] = values.pop("dtype", None)
    text = values["text_config"]
    rope = dict(text.pop("rope_parameters"))
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    for section in (values, text, values["audio_encoder_config"]):
        section.pop("dtype", None)
    return values


def _llama_config(value: Any) -> LlamaConfig:
    if value is None:
        value = _LLAMA_3_2_3B
    if isinstance(value, dict):
        if value.get("model_type", "llama") != "llama":
            raise BadConfig(f"text_config.model_type={value['model_type']!r} is not supported, expected 'llama'")
        try:
            value = LlamaConfig(**{k: v for k, v in value.items() if k != "model_type"})
        except StrictDataclassError as error:
            raise BadConfig(f"text_config: {error.__cause__ or error}") from error
    if not isinstance(value, LlamaConfig):
        raise BadConfig(f"text_config is a {type(value).__name__}, expected a mapping or a LlamaConfig")
    _check_divisible("num_key_value_heads", value.num_key_value_heads, "num_attention_heads", value.num_attention_heads)
    return value


def _encoder_config(value: Any) -> HiggsAudioEncoderConfig:
    if isinstance(value, dict):
        return HiggsAudioEncoderConfig(**{k: v for k, v in value.items() if k != "model_type"})
    if value is not None and not isinstance(value, HiggsAudioEncoderConfig):
        raise BadConfig(
            f"audio_encoder_config is a {type(value).__name__}, expected a mapping or a HiggsAudioEncoderConfig"
        )
    return value or HiggsAudioEncoderConfig()


def _check_types(config: PreTrainedConfig) -> None:
    """Check integers, booleans and strings by their annotations; a boolean may be 0 or 1, as in a published config."""
    for name, annotation in type(config).__annotations__.items():
        value = getattr(config, name, None)
        if annotation == "bool" and value in (0, 1):
            setattr(config, name, bool(value))
        elif annotation in _FIELD_TYPES:
            kind, expected = _FIELD_TYPES[annotation]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise BadConfig(f"{name}={value!r} is not {expected}")


_FIELD_TYPES: dict[str, tuple[Any, str]] = {
    "int": (int, "an integer"),
    "bool": ((), "true or false"),
    "str": (str, "a string"),
}


def _check_divisible(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if divisor < 1 or value % divisor:
        raise BadConfig(f"{name}={value} is not a multiple of {divisor_name}={divisor}")


def _check_adapter(config: HiggsAudioConfig) -> None:
    adapter_type, layers = config.audio_adapter_type, config.audio_dual_ffn_layers
    if adapter_type not in ADAPTER_TYPES:
        raise BadConfig(f"audio_adapter_type={adapter_type!r} is unknown, expected one of {', '.join(ADAPTER_TYPES)}")
    if adapter_type != "stack":
        if layers is None:
            raise BadConfig(f"audio_adapter_type={adapter_type!r} needs audio_dual_ffn_layers, which is None")
        if not isinstance(layers, list | tuple) or not all(type(layer) is int for layer in layers):
            raise BadConfig(f"audio_dual_ffn_layers={layers!r} is not a list of integers")
        num_layers = config.text_config.num_hidden_layers
        if out_of_range := [layer for layer in layers if not 0 <= layer < num_layers]:
            raise BadConfig(
                f"audio_dual_ffn_layers contains layer {out_of_range[0]}, "
                f"but text_config.num_hidden_layers={num_layers}"
            )
        if len(set(layers)) != len(layers):
            raise BadConfig(f"audio_dual_ffn_layers={layers} contains a layer twice")
    if config.use_rq_transformer:
        suffix = f" with use_delay_pattern={config.use_delay_pattern}" if config.use_delay_pattern else ""
        raise BadConfig(f"use_rq_transformer=True{suffix} is not supported: no Higgs Audio checkpoint uses it")
    if config.audio_decoder_proj_num_layers:
        raise BadConfig(
            f"audio_decoder_proj_num_layers={config.audio_decoder_proj_num_layers} is not supported, expected 0"
        )


def _check_codebooks(config: HiggsAudioConfig) -> None:
    for name in ("audio_num_codebooks", "audio_codebook_size"):
        if getattr(config, name) < 1:
            raise BadConfig(f"{name}={getattr(config, name)} is not positive")
    size = config.audio_codebook_size
    for name in ("audio_stream_bos_id", "audio_stream_eos_id"):
        if getattr(config, name) not in (size, size + 1):
            raise BadConfig(
                f"{name}={getattr(config, name)} is not one of the two ids after the codes: "
                f"expected {size} or {size + 1} with audio_codebook_size={size}"
            )
    if config.audio_stream_bos_id == config.audio_stream_eos_id:
        raise BadConfig(
            f"audio_stream_bos_id={config.audio_stream_bos_id} and "
            f"audio_stream_eos_id={config.audio_stream_eos_id} are the same token"
        )


def _check_vocabulary(config: HiggsAudioConfig) -> None:
    # A vocabulary may lack a token that the checkpoint never uses; its id is then still the default.
    optional = {
        "audio_in_token_idx": tokens.AUDIO_IN_ID,
        "audio_out_bos_token_id": tokens.AUDIO_OUT_BOS_ID,
        "audio_eos_token_id": tokens.AUDIO_EOS_ID,
    }
    names = ("pad_token_id", "audio_out_token_idx", *optional)
    for name in names:
        token_id = getattr(config, name)
        if token_id is not None and not config.has_token(token_id) and token_id != optional.get(name):
            raise BadConfig(
                f"{name}={token_id} is outside the vocabulary of text_config.vocab_size={config.text_config.vocab_size}"
            )
    seen: dict[int, str] = {}
    for name in names:
        token_id = getattr(config, name)
        if token_id in seen:
            raise BadConfig(f"{name} and {seen[token_id]} are both token {token_id}")
        if token_id is not None:
            seen[token_id] = name
