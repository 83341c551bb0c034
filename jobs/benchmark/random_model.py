"""A random Higgs Audio model of any width and depth, a small random codec, and a byte tokenizer; deterministic."""

from __future__ import annotations

import torch
from torch import nn
from transformers import HubertConfig, PreTrainedTokenizerFast

from higgs_model import tokens
from higgs_model.codec.codec import HiggsAudioCodec
from higgs_model.codec.config import HiggsAudioCodecConfig
from higgs_model.config import HiggsAudioConfig
from higgs_model.model.model import HiggsAudioModel
from higgs_model.script.prompt import END_OF_TURN
from jobs.demo.tokenizer import NUM_BYTES, PAD, build_tokenizer


def build(
    hidden_size: int = 64, num_layers: int = 2
) -> tuple[HiggsAudioModel, HiggsAudioCodec, PreTrainedTokenizerFast]:
    """Build model, codec and tokenizer, in float32 on the CPU; the spread of logits does not depend on the size."""
    tokenizer = build_tokenizer()
    ids = tokenizer.get_added_vocab()
    with torch.random.fork_rng(devices=[]):
        # Not only parameters are random: the codebooks' buffers are drawn when the codec is constructed.
        torch.manual_seed(0)
        model, codec = (
            HiggsAudioModel(_config(ids, hidden_size, num_layers)).eval(),
            HiggsAudioCodec(_codec_config()).eval(),
        )
    _randomize(model, 1.6 / hidden_size**0.5)
    _randomize(codec, 0.1)
    return model, codec, tokenizer


def _randomize(module: nn.Module, deviation: float) -> None:
    """Draw all parameters from a fixed seed, independent of the global generator's state."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * deviation
            parameter.copy_(noise if parameter.dim() > 1 else parameter + 0.1 * noise)


def _config(ids: dict[str, int], hidden_size: int, num_layers: int) -> HiggsAudioConfig:
    return HiggsAudioConfig(
        text_config={
            "vocab_size": len(ids) + NUM_BYTES,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": hidden_size // 4,
            "max_position_embeddings": 8192,
            "eos_token_id": ids[END_OF_TURN],
        },
        audio_adapter_type="dual_ffn",
        audio_dual_ffn_layers=list(range(num_layers)),
        audio_num_codebooks=8,
        use_delay_pattern=True,
        skip_audio_tower=True,
        encode_whisper_embed=False,
        encode_audio_in_tokens=True,
        pad_token_id=ids[PAD],
        audio_in_token_idx=ids[tokens.AUDIO_IN],
        audio_out_token_idx=ids[tokens.AUDIO_OUT],
        audio_out_bos_token_id=ids[tokens.AUDIO_OUT_BOS],
        audio_eos_token_id=ids[tokens.AUDIO_EOS],
    )


def _codec_config() -> HiggsAudioCodecConfig:
    return HiggsAudioCodecConfig(
        encoder_channels=4,
        decoder_channels=64,
        acoustic_dim=32,
        codebook_dim=8,
        semantic=HubertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            conv_dim=(16,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
    )
