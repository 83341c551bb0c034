"""Builders of small but real configurations, networks and prompts, with seeded random numbers."""

import torch
from transformers import HubertConfig

from higgs_model import HiggsAudioConfig, HiggsAudioModel
from higgs_model.codec import HiggsAudioCodec, HiggsAudioCodecConfig

VOCAB, PAD, IN, OUT, OUT_BOS, AUDIO_EOS, EOT = 160, 150, 151, 152, 153, 154, 155
K, SIZE = 4, 24
BOS, EOS = SIZE, SIZE + 1
MELS, MEL_FRAMES = 8, 40


def config(**overrides):
    """A v2-like network of 4 layers: dual FFN everywhere, recordings as codes, delay pattern."""
    values = {
        "text_config": {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "eos_token_id": EOT,
        },
        "audio_encoder_config": {
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "max_source_positions": MEL_FRAMES // 2,
            "num_mel_bins": MELS,
            "pad_token_id": PAD,
        },
        "audio_adapter_type": "dual_ffn",
        "audio_dual_ffn_layers": [0, 1, 2, 3],
        "audio_num_codebooks": K,
        "audio_codebook_size": SIZE,
        "use_delay_pattern": True,
        "skip_audio_tower": True,
        "encode_whisper_embed": False,
        "encode_audio_in_tokens": True,
        "pad_token_id": PAD,
        "audio_in_token_idx": IN,
        "audio_out_token_idx": OUT,
        "audio_out_bos_token_id": OUT_BOS,
        "audio_eos_token_id": AUDIO_EOS,
        **overrides,
    }
    if values["audio_adapter_type"] == "stack":
        values["audio_dual_ffn_layers"] = None
    return HiggsAudioConfig(**values)


def randomize(module, seed=0, std=0.25):
    """Initialize weights large enough for clearly different outputs, and norms around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise if parameter.dim() > 1 else 1 + noise)
    return module


def model(seed=0, **overrides):
    return randomize(HiggsAudioModel(config(**overrides)), seed).eval()


def suppress_stream_tokens(heads_weight, num_codebooks, rows):
    """Set the logits of BOS and EOS to 0, so that greedy clips never end."""
    with torch.no_grad():
        heads_weight.view(num_codebooks, rows, -1)[:, -2:] = 0


def clip(generator, frames):
    """Return a clip in delayed form with `frames` columns."""
    return torch.randint(SIZE, (K, frames), generator=generator)


def batch(lengths, clip_frames, seed=0, padding="left", end=OUT_BOS, kind=OUT):
    """Return a batch of uneven prompts with one clip each: keyword arguments for `forward` and `generate`."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        tokens = torch.randint(1, 100, (length,), generator=generator)
        tokens[length // 2], tokens[-1] = kind, end
        place = slice(longest - length, None) if padding == "left" else slice(0, length)
        ids[row, place], mask[row, place] = tokens, 1
    clips = [clip(generator, frames) for frames in clip_frames]
    starts = torch.tensor([0, *clip_frames]).cumsum(0)[:-1]
    name = "audio_out_ids" if kind == OUT else "audio_in_ids"
    return {
        "input_ids": ids,
        "attention_mask": mask,
        name: torch.cat(clips, dim=1),
        f"{name}_start": starts,
    }


SEMANTIC = HubertConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    conv_dim=(8,) * 7,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
)


def codec(**overrides):
    """Return a codec with 3 codebooks, small enough to train in seconds."""
    torch.manual_seed(0)
    values = {
        "num_codebooks": 3,
        "codebook_dim": 8,
        "acoustic_dim": 16,
        "decoder_channels": 64,
        "semantic": SEMANTIC,
    }
    return HiggsAudioCodec(HiggsAudioCodecConfig(**values | overrides))
