"""The Higgs Audio network.

    token ids, codes, mels ─▶ embeddings, merged ─▶ decoder layers ─▶ norm ─▶ text head, audio head

In: a batch of prompts with one placeholder per clip, and the clips. Out: logits, and losses if labels are given. The
network does not depend on text, voices or files. Parameter names are those of the original checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from higgs_model.config import HiggsAudioConfig
from higgs_model.errors import BadInput
from higgs_model.model import freezing, loss
from higgs_model.model.cache import KVCache
from higgs_model.model.heads import HiggsAudioDecoderProjector
from higgs_model.model.inputs import ModelInputs, check_cache, check_inputs
from higgs_model.model.layers import HiggsAudioDualFFNDecoderLayer, Routing, build_layers
from higgs_model.model.masks import build_masks, compute_position_ids
from higgs_model.model.merge import (
    TRAINING_ROUND_TO,
    Clips,
    Expansion,
    clips_from_features,
    clips_from_starts,
    expand_placeholders,
)
from higgs_model.model.output import HiggsAudioOutput
from higgs_model.model.tower import HiggsAudioEncoder, HiggsAudioFeatureProjector


class _BatchClips(NamedTuple):
    """The embeddings for all placeholders of a batch."""

    features: Clips | None
    codes: Clips | None
    out: Clips


class HiggsAudioNetwork(PreTrainedModel):
    """Higgs Audio: a Llama backbone that reads and generates text tokens and audio frames.

    `HiggsAudioModel` adds checkpoints and generation.

    Attributes:
        audio_codebook_weights: (K,) weight of each codebook in the audio loss; uniform, with sum 1.
        revision: the Hub commit of the weights, or None.
    """

    config_class = HiggsAudioConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["HiggsAudioDualFFNDecoderLayer", "LlamaDecoderLayer", "WhisperEncoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True

    def __init__(self, config: HiggsAudioConfig) -> None:
        super().__init__(config)
        text = config.text_config
        # The base class resolves the attention implementation for the top-level config; attention modules read it from
        # their sub-config. Two models with different attention must therefore not share a configuration object.
        for sub_config in (text, config.audio_encoder_config):
            sub_config._attn_implementation = config._attn_implementation
        self.embed_tokens: nn.Embedding | freezing.PartiallyFrozenEmbedding = nn.Embedding(
            text.vocab_size, text.hidden_size, config.pad_token_id
        )
        self.layers = build_layers(config)
        self.norm = LlamaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.audio_tower = None if config.skip_audio_tower else HiggsAudioEncoder(config.audio_encoder_config)
        self.audio_encoder_proj = None if config.skip_audio_tower else HiggsAudioFeatureProjector(config)
        self.audio_decoder_proj = HiggsAudioDecoderProjector(config)
        self.audio_codebook_embeddings = nn.Embedding(
            config.audio_num_codebooks * config.num_codebook_rows, text.hidden_size
        )
        self.audio_out_embed_projector = (
            nn.Linear(text.hidden_size, text.hidden_size, bias=False) if config.use_audio_out_embed_projector else None
        )
        self.revision: str | None = None
        self.reset_buffers()
        self.post_init()

    def reset_buffers(self) -> None:
        """Recompute the buffers that follow from the configuration and are not in checkpoints."""
        config = self.config
        device = self.embed_tokens_device
        weights = torch.full((config.audio_num_codebooks,), 1 / config.audio_num_codebooks, device=device)
        offsets = torch.arange(config.audio_num_codebooks, device=device) * config.num_codebook_rows
        self.register_buffer("audio_codebook_weights", weights, persistent=False)
        self.register_buffer("audio_codebook_offsets", offsets, persistent=False)
        self.rotary_emb = LlamaRotaryEmbedding(config.text_config).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # A cast to bfloat16 would round the rotary frequencies, which stay float32 whatever the dtype of the weights.
        self.rotary_emb = LlamaRotaryEmbedding(self.config.text_config).to(self.embed_tokens_device)
        return self

    @property
    def embed_tokens_device(self) -> torch.device:
        """Device of the token embedding, and of the inputs."""
        return next(self.embed_tokens.parameters()).device

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights from a normal distribution, biases with 0 and norms with 1, as in the reference."""
        std = self.config.audio_encoder_config.init_std
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, (nn.LayerNorm, LlamaRMSNorm)):
            nn.init.ones_(module.weight)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            nn.init.zeros_(bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()

    # ------------------------------------------------------------------ embedding

    def embed_frames(self, frames: Tensor) -> Tensor:
        """Embed frames (…, K) int64 → (…, D): the sum, or mean, over codebooks."""
        embedded = self.audio_codebook_embeddings(frames + self.audio_codebook_offsets)
        embedded = embedded.mean(dim=-2) if self.config.audio_embed_avg else embedded.sum(dim=-2)
        if self.audio_out_embed_projector is not None:
            embedded = self.audio_out_embed_projector(embedded)
        return embedded

    def merge(self, inputs: ModelInputs, *, left_padding: bool, round_to: int) -> tuple[Expansion, Tensor]:
        """Expand the placeholders of a validated batch, and return the expansion and the embeddings (B, S, D)."""
        clips = self._embed_clips(inputs)
        expansion = expand_placeholders(
            self.config,
            inputs.input_ids,
            inputs.attention_mask,
            inputs.label_ids,
            num_features=clips.features.lengths if clips.features else 0,
            num_codes=clips.codes.lengths if clips.codes else 0,
            num_frames=clips.out.lengths,
            left_padding=left_padding,
            round_to=round_to,
        )
        embeddings = expansion.merge_embeddings(
            self.embed_tokens(inputs.input_ids),
            audio_in_features=clips.features.embeddings if clips.features else None,
            audio_in_codes=clips.codes.embeddings if clips.codes else None,
            audio_out=clips.out.embeddings,
        )
        return expansion, embeddings

    def encode_features(self, mels: Tensor, mel_mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """Encode recordings with the audio tower and project them to the backbone's width.

        Without recordings, the tower still runs if gradients are enabled: every parameter must be in the graph.

        Returns:
            features (clips, positions, D) and the length of each (clips,); None without a tower, or without
            recordings if gradients are disabled.
        """
        if self.audio_tower is None or self.audio_encoder_proj is None or not (len(mels) or torch.is_grad_enabled()):
            return None
        encoded, lengths = self.audio_tower(mels, mel_mask)
        return self.audio_encoder_proj(encoded), lengths

    def _embed_clips(self, inputs: ModelInputs) -> _BatchClips:
        features, codes = None, None
        if inputs.audio_features is not None and inputs.audio_feature_attention_mask is not None:
            encoded = self.encode_features(inputs.audio_features, inputs.audio_feature_attention_mask)
            features = None if encoded is None else self._fill_missing(clips_from_features(*encoded), inputs)
        if inputs.audio_in_ids is not None and inputs.audio_in_ids_start is not None:
            codes = clips_from_starts(self.embed_frames(inputs.audio_in_ids.T), inputs.audio_in_ids_start)
            codes = self._fill_missing(codes, inputs)
        out = clips_from_starts(self.embed_frames(inputs.audio_out_ids.T), inputs.audio_out_ids_start)
        return _BatchClips(features, codes, out)

    def _fill_missing(self, clips: Clips, inputs: ModelInputs) -> Clips:
        """Give every recording a length of 0 if the batch has no embeddings of this kind."""
        if clips.lengths.numel():
            return clips
        num_recordings = int((inputs.input_ids == self.config.audio_in_token_idx).sum())
        return Clips(clips.embeddings, clips.lengths.new_zeros(num_recordings))

    # ------------------------------------------------------------------ backbone

    def backbone(
        self,
        embeddings_BSD: Tensor,
        attention_mask_BS: Tensor,
        audio_mask_BS: Tensor,
        cache: KVCache | None = None,
        *,
        all_audio: bool | None = None,
        has_padding: bool | None = None,
        sample_ids_BS: Tensor | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Run the decoder layers and the final norm on new positions, which may continue those in `cache`.

        Args:
            embeddings_BSD: embeddings of the new positions.
            attention_mask_BS: bool, positions that are not padding.
            audio_mask_BS: bool, positions that take the audio path.
            cache: extended in place.
            all_audio: True or False if the caller knows that all positions are of that kind.
            has_padding: whether a new position is padding; None reads the mask, which synchronises with the device.
            sample_ids_BS: int64, ids of the samples packed into a row one after the other. They do not attend to each
                other, and each counts its positions from 0. Not supported with a cache.
            routing: the routing of `audio_mask_BS`, if the caller has it.

        Returns:
            (B, S, D).
        """
        if has_padding is None:
            has_padding = not bool(attention_mask_BS.all())
        past = KVCache() if cache is None else cache
        position_ids = compute_position_ids(attention_mask_BS, past.num_tokens, sample_ids_BS)
        past.extend(attention_mask_BS, audio_mask_BS, has_padding)
        masks = build_masks(
            past.attention_mask,
            past.audio_mask,
            num_queries=embeddings_BSD.shape[1],
            num_keys=past.num_keys,
            has_padding=past.has_padding,
            implementation=self.config._attn_implementation,
            dtype=embeddings_BSD.dtype,
            with_text_only=self.config.audio_adapter_type == "dual_ffn_fast_forward" and not all_audio,
            with_audio_only=self.config.use_audio_out_self_attention and all_audio is not False,
            sample_ids_BL=sample_ids_BS,
        )
        routing = routing or Routing.from_mask(audio_mask_BS, all_audio)
        rope = self.rotary_emb(embeddings_BSD, position_ids)
        hidden = embeddings_BSD
        for layer in self.layers:
            if isinstance(layer, HiggsAudioDualFFNDecoderLayer):
                hidden = layer(hidden, routing=routing, masks=masks, position_embeddings=rope, past_key_values=cache)
            else:
                hidden = layer(hidden, attention_mask=masks.shared, position_embeddings=rope, past_key_values=cache)
        normed: Tensor = self.norm(hidden)
        return normed

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_feature_attention_mask: Tensor | None = None,
        audio_in_ids: Tensor | None = None,
        audio_in_ids_start: Tensor | None = None,
        audio_out_ids: Tensor | None = None,
        audio_out_ids_start: Tensor | None = None,
        label_ids: Tensor | None = None,
        label_audio_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
    ) -> HiggsAudioOutput:
        """Run a batch of prompts; see `ModelInputs` for shapes and `HiggsAudioOutput` for results.

        With a cache, or for a single row, expanded rows are padded on the left, otherwise on the right. With a cache,
        their length is not rounded up.

        Raises:
            BadInput: the batch is invalid.
        """
        inputs = check_inputs(
            self.config,
            self.embed_tokens_device,
            input_ids=input_ids,
            attention_mask=attention_mask,
            audio_features=audio_features,
            audio_feature_attention_mask=audio_feature_attention_mask,
            audio_in_ids=audio_in_ids,
            audio_in_ids_start=audio_in_ids_start,
            audio_out_ids=audio_out_ids,
            audio_out_ids_start=audio_out_ids_start,
            label_ids=label_ids,
            label_audio_ids=label_audio_ids,
        )
        use_cache = use_cache or past_key_values is not None
        if use_cache and self.training and any(layer.gradient_checkpointing for layer in self.layers):
            raise BadInput("use_cache=True is incompatible with gradient checkpointing in training")
        if past_key_values is not None:
            check_cache(past_key_values, inputs.input_ids.shape[0])
        if use_cache and past_key_values is None:
            past_key_values = KVCache()
        merged, embeddings = self.merge(
            inputs,
            left_padding=use_cache or inputs.input_ids.shape[0] == 1,
            round_to=1 if use_cache else TRAINING_ROUND_TO,
        )
        hidden = self.backbone(embeddings, merged.attention_mask_BS, merged.audio_mask_BS, past_key_values)
        output = HiggsAudioOutput(
            logits=self.audio_decoder_proj.text_logits(hidden) if self.config.use_text_head else None,
            audio_logits=self.audio_decoder_proj.audio_logits(hidden[merged.audio_out_mask_BS]),
            expanded_input_ids=merged.input_ids_BS,
            expanded_labels=merged.labels_BS,
            audio_in_mask=merged.audio_in_mask_BS,
            audio_in_discrete_codes_mask=merged.audio_in_codes_mask_BS,
            audio_out_mask=merged.audio_out_mask_BS,
            attention_mask=merged.attention_mask_BS,
            past_key_values=past_key_values,
        )
        loss.add_losses(output, inputs, merged.attention_mask_BS, self.audio_codebook_weights)
        return output

    # ------------------------------------------------------------------ training

    def freeze_llm(self, freeze_embed: bool = True, freeze_embed_until_idx: int | None = None) -> None:
        """Freeze the original text backbone and, of its embedding, all rows or those before an index."""
        freezing.freeze(freezing.text_backbone_modules(self.layers, self.norm))
        if freeze_embed:
            self.freeze_embed(freeze_embed_until_idx)

    def freeze_embed(self, until_idx: int | None = None) -> None:
        """Freeze the text embedding, completely or only the rows before an index."""
        if until_idx is None:
            freezing.freeze([self.embed_tokens])
        else:
            self.embed_tokens = freezing.PartiallyFrozenEmbedding(self.embed_tokens, until_idx)

    def freeze_text_head(self, freeze_text_head_until_idx: int | None = None) -> None:
        """Freeze the text head, completely or only the outputs before an index."""
        heads = self.audio_decoder_proj
        if freeze_text_head_until_idx is None or heads.text_lm_head is None:
            freezing.freeze([heads.text_lm_head])
        else:
            heads.text_lm_head = freezing.PartiallyFrozenLinear(heads.text_lm_head, freeze_text_head_until_idx)

    def freeze_audio_tower(self) -> None:
        """Freeze the audio tower, if there is one."""
        freezing.freeze([self.audio_tower])

    def freeze_audio_encoder_proj(self) -> None:
        """Freeze the projector from the audio tower, if there is one."""
        freezing.freeze([self.audio_encoder_proj])

    def parameter_count_per_component(self) -> dict[str, dict[str, int]]:
        """Count parameters by component.

        Returns:
            {"trainable": …, "total": …}, each with the counts of audio_tower, llm_embed, llm_non_embed, audio_embed,
            audio_adapter, and their sum as overall.
        """
        components: dict[str, list[nn.Module | None]] = {
            "audio_tower": [self.audio_tower],
            "llm_embed": [self.embed_tokens, self.audio_decoder_proj.text_lm_head],
            "llm_non_embed": [*freezing.text_backbone_modules(self.layers, self.norm)],
            "audio_embed": [self.audio_codebook_embeddings],
        }
        return freezing.count_parameters(components, "audio_adapter", self)
