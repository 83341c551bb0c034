"""The decoder layer that is Higgs Audio's own: one attention, two feed-forward paths.

Text and audio positions share the attention, but have their own norms and FFN. Variants: audio positions may first
attend among themselves (`audio_attn`), or a whole layer may be there for text only (`fast_forward`). Which position
is audio is decided once a pass, in `Routing`; attention, FFN and norms themselves are transformers' Llama modules.
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

Positions = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Routing:
    """Which of the B × S positions take the audio path.

    `audio_BS1` (B, S, 1) bool. Either `all_audio` says of which one kind all positions are, as in the decode step of
    speech, and none is moved; or `indices` are the flat indices of the text and of the audio positions.
    """

    audio_BS1: Tensor
    all_audio: bool | None = None
    indices: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, audio_BS: Tensor, all_audio: bool | None = None) -> Routing:
        """Route by mask; `all_audio` spares the look when the caller knows that the pass is uniform."""
        if all_audio is not None:
            return cls(audio_BS.unsqueeze(-1), all_audio)
        flat = audio_BS.flatten()
        return cls(audio_BS.unsqueeze(-1), None, (_where(~flat), _where(flat)))

    def __call__(self, hidden_BSD: Tensor, text: Positions, audio: Positions) -> Tensor:
        """Apply `text` or `audio`, functions of (positions, D), to each position."""
        if self.indices is None:
            return audio(hidden_BSD) if self.all_audio else text(hidden_BSD)
        flat = hidden_BSD.flatten(0, 1)
        at_text, at_audio = self.indices
        from_text, from_audio = text(flat[at_text]), audio(flat[at_audio])
        merged = torch.empty(flat.shape, dtype=from_text.dtype, device=flat.device)
        return merged.index_copy(0, at_text, from_text).index_copy(0, at_audio, from_audio).view_as(hidden_BSD)


def _where(flat: Tensor) -> Tensor:
    return flat.nonzero().squeeze(1)


class HiggsAudioDualFFNDecoderLayer(GradientCheckpointingLayer):
    """A Llama layer with a second FFN and second norms for audio positions.

    Args:
        layer_idx: index of the attention in the cache; an audio self-attention takes the next one.
        fast_forward: no audio path at all: audio positions pass unchanged, and no query sees their keys.
        audio_attention: audio positions attend among themselves before the shared attention.
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
            changed = hidden_states + attended
            changed = changed + self.mlp(self.post_attention_layernorm(changed))
            return torch.where(routing.audio_BS1, hidden_states, changed)

        residual = hidden_states
        hidden_states = routing(residual, self.input_layernorm, self.audio_input_layernorm)
        # Without an audio position nobody would read what the audio attention writes.
        if self.audio_attention and routing.all_audio is not False:
            among = self._attend(self.audio_attn, hidden_states, masks.audio_only, position_embeddings, past_key_values)
            among = residual + among
            residual = torch.where(routing.audio_BS1, among, residual)
            hidden_states = torch.where(routing.audio_BS1, self.audio_post_audio_attn_layer_norm(among), hidden_states)
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
    """The backbone's layers; an audio self-attention takes a cache index of its own."""
    dual = set(config.audio_dual_ffn_layers or ()) if config.audio_adapter_type != "stack" else set()
    with_attention = config.use_audio_out_self_attention
    layers = nn.ModuleList()
    layer_idx = 0
    for number in range(config.text_config.num_hidden_layers):
        if number in dual:
            layers.append(HiggsAudioDualFFNDecoderLayer(config, layer_idx, audio_attention=with_attention))
            layer_idx += 2 if with_attention else 1
            continue
        if config.audio_adapter_type == "dual_ffn_fast_forward":
            layers.append(HiggsAudioDualFFNDecoderLayer(config, layer_idx, fast_forward=True))
        else:
            layers.append(LlamaDecoderLayer(config.text_config, layer_idx))
        layer_idx += 1
    return layers
