"""Higgs Audio's decoder layer: one shared attention, and separate FFNs for text and audio positions.

Text and audio positions share the attention but have their own norms and FFNs. Variants: audio positions may first
attend among themselves (`audio_attn`), or a layer may apply to text positions only (`fast_forward`). `Routing` is
computed once per forward pass. Attention, FFNs and norms are transformers' Llama modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from higgs_model.config import HiggsAudioConfig
from higgs_model.model.cache import KVCache
from higgs_model.model.masks import AttentionMasks

PositionWiseFn = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Routing:
    """Which of the B × S positions take the audio path.

    Attributes:
        audio_mask_BS1: (B, S, 1) bool.
        all_audio: True or False if all positions are of one kind, as in a decode step of audio; no position is then
            gathered or scattered. None for a mixed pass.
        indices: in a mixed pass, the flat indices of the text positions and of the audio positions.
    """

    audio_mask_BS1: Tensor
    all_audio: bool | None = None
    indices: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_mask(cls, audio_mask_BS: Tensor, all_audio: bool | None = None) -> Routing:
        """Route by mask; with `all_audio`, the mask is not read, which avoids a synchronisation with the device."""
        if all_audio is not None:
            return cls(audio_mask_BS.unsqueeze(-1), all_audio)
        flat = audio_mask_BS.flatten()
        return cls(audio_mask_BS.unsqueeze(-1), None, (_true_indices(~flat), _true_indices(flat)))

    def __call__(self, hidden_BSD: Tensor, text: PositionWiseFn, audio: PositionWiseFn) -> Tensor:
        """Apply `text` or `audio`, functions (…, D) → (…, D), to each position."""
        if self.indices is None:
            return audio(hidden_BSD) if self.all_audio else text(hidden_BSD)
        flat = hidden_BSD.flatten(0, 1)
        text_indices, audio_indices = self.indices
        text_out, audio_out = text(flat[text_indices]), audio(flat[audio_indices])
        merged = torch.empty(flat.shape, dtype=text_out.dtype, device=flat.device)
        return merged.index_copy(0, text_indices, text_out).index_copy(0, audio_indices, audio_out).view_as(hidden_BSD)


def _true_indices(flat: Tensor) -> Tensor:
    return flat.nonzero().squeeze(1)


class HiggsAudioDualFFNDecoderLayer(GradientCheckpointingLayer):
    """A Llama layer with a second FFN and second norms for audio positions.

    Args:
        layer_idx: cache index of the attention; the audio self-attention uses the next one.
        fast_forward: omit the audio path: audio positions pass unchanged, and no query attends to their keys.
        audio_attention: let audio positions attend among themselves before the shared attention.
    """

    def __init__(
        self,
        config: HiggsAudioConfig,
        layer_idx: int,
        *,
        fast_forward: bool = False,
        audio_attention: bool = False,
    ) -> None:
        super().__init__()
        text = config.text_config
        self.fast_forward = fast_forward
        self.audio_attention = audio_attention
        self.self_attn = LlamaAttention(text, layer_idx)
        self.mlp = LlamaMLP(text)
        self.input_layernorm = LlamaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        if fast_forward:
            return
        if audio_attention:
            self.audio_attn = LlamaAttention(text, layer_idx + 1)
            self.audio_post_audio_attn_layer_norm = LlamaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.audio_mlp = LlamaMLP(text)
        self.audio_input_layernorm = LlamaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.audio_post_attention_layernorm = LlamaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        routing: Routing,
        masks: AttentionMasks,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: KVCache | None = None,
    ) -> Tensor:
        """(B, S, D) → (B, S, D)."""
        if self.fast_forward:
            if routing.all_audio:
                return hidden_states
            attended = self._attend(
                self.self_attn,
                self.input_layernorm(hidden_states),
                masks.text_only,
                position_embeddings,
                past_key_values,
            )
            text_out = hidden_states + attended
            text_out = text_out + self.mlp(self.post_attention_layernorm(text_out))
            return torch.where(routing.audio_mask_BS1, hidden_states, text_out)

        residual = hidden_states
        hidden_states = routing(residual, self.input_layernorm, self.audio_input_layernorm)
        # Without audio positions, nothing would read the keys and values of the audio attention.
        if self.audio_attention and routing.all_audio is not False:
            attended = self._attend(
                self.audio_attn, hidden_states, masks.audio_only, position_embeddings, past_key_values
            )
            attended = residual + attended
            residual = torch.where(routing.audio_mask_BS1, attended, residual)
            normed = self.audio_post_audio_attn_layer_norm(attended)
            hidden_states = torch.where(routing.audio_mask_BS1, normed, hidden_states)
        hidden_states = residual + self._attend(
            self.self_attn, hidden_states, masks.shared, position_embeddings, past_key_values
        )
        return hidden_states + routing(
            hidden_states,
            lambda text: self.mlp(self.post_attention_layernorm(text)),
            lambda audio: self.audio_mlp(self.audio_post_attention_layernorm(audio)),
        )

    @staticmethod
    def _attend(
        attention: nn.Module,
        hidden_states: Tensor,
        mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: KVCache | None,
    ) -> Tensor:
        attended: Tensor = attention(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=mask,
            past_key_values=past_key_values,
        )[0]
        return attended


def build_layers(config: HiggsAudioConfig) -> nn.ModuleList:
    """Build the backbone's layers. An audio self-attention has its own cache index."""
    dual_ffn_layers = set(config.audio_dual_ffn_layers or ()) if config.audio_adapter_type != "stack" else set()
    audio_attention = config.use_audio_out_self_attention
    layers = nn.ModuleList()
    layer_idx = 0
    for layer in range(config.text_config.num_hidden_layers):
        if layer in dual_ffn_layers:
            layers.append(HiggsAudioDualFFNDecoderLayer(config, layer_idx, audio_attention=audio_attention))
            layer_idx += 2 if audio_attention else 1
            continue
        if config.audio_adapter_type == "dual_ffn_fast_forward":
            layers.append(HiggsAudioDualFFNDecoderLayer(config, layer_idx, fast_forward=True))
        else:
            layers.append(LlamaDecoderLayer(config.text_config, layer_idx))
        layer_idx += 1
    return layers
