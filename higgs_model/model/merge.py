"""From prompts with one placeholder a clip to sequences with one position a frame or feature.

    input_ids            a b X c Y d        X is <|AUDIO_OUT|>, 3 frames; Y is <|AUDIO|>, 2 features and 2 codes
    expanded             a b X X X c Y Y Y Y d
    audio positions      . . o o o . . . i i .     o audio-out, i audio-in codes; features are text positions

Everything is computed at once for a batch of uneven samples, padded on either side. Where both are given, a clip's
features come before its codes. Nothing here embeds anything or checks what it is given (`inputs` does).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from higgs_model import tokens
from higgs_model.config import HiggsAudioConfig


@dataclasses.dataclass(frozen=True)
class Clips:
    """What fills the placeholders of one kind, in the order in which they stand in the batch.

    `embeddings` (positions of all clips, D) one clip after the other, `lengths` (clips,) int64.
    """

    embeddings: Tensor
    lengths: Tensor


@dataclasses.dataclass(frozen=True)
class Merged:
    """A batch of expanded sequences; S is the expanded length."""

    embeddings_BSD: Tensor
    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    labels_BS: Tensor | None
    audio_in_mask_BS: Tensor
    audio_in_codes_mask_BS: Tensor
    audio_out_mask_BS: Tensor

    @property
    def audio_mask_BS(self) -> Tensor:
        """Positions that take the audio path: codes, in or out."""
        return self.audio_in_codes_mask_BS | self.audio_out_mask_BS


def code_clips(embeddings: Tensor, starts: Tensor) -> Clips:
    """Clips given by where each starts in the concatenated codes."""
    ends = torch.cat([starts[1:], starts.new_tensor([embeddings.shape[0]])])
    return Clips(embeddings, ends - starts)


def feature_clips(features: Tensor, lengths: Tensor) -> Clips:
    """Clips of tower features (clips, positions, D), of which the first `lengths` are real."""
    real = torch.arange(features.shape[1], device=features.device) < lengths.unsqueeze(1)
    return Clips(features[real], lengths)


def merge(
    config: HiggsAudioConfig,
    input_ids_BS: Tensor,
    text_embeddings_BSD: Tensor,
    attention_mask_BS: Tensor,
    labels_BS: Tensor | None,
    *,
    audio_in_features: Clips | None,
    audio_in_codes: Clips | None,
    audio_out: Clips,
    left_padding: bool,
    round_to: int,
) -> Merged:
    """Expand every placeholder to its clip.

    Args:
        input_ids_BS, attention_mask_BS, labels_BS: the prompts, with one placeholder a clip.
        text_embeddings_BSD: (B, S, D) embeddings of all tokens; those of placeholders are not used.
        left_padding: whether rows end or begin together.
        round_to: the expanded length is a multiple of this.
    """
    device = input_ids_BS.device
    batch_size = input_ids_BS.shape[0]
    is_in = input_ids_BS == config.audio_in_token_idx
    is_out = input_ids_BS == config.audio_out_token_idx

    # How many positions each token becomes, and how many of them are features.
    counts = torch.ones_like(input_ids_BS)
    num_features = torch.zeros_like(input_ids_BS)
    counts[is_out] = audio_out.lengths
    if audio_in_features is not None:
        num_features[is_in] = audio_in_features.lengths
    counts[is_in] = num_features[is_in]
    if audio_in_codes is not None:
        counts[is_in] += audio_in_codes.lengths

    ends = counts.cumsum(dim=1)
    length = -(-int(ends[:, -1].max()) // round_to) * round_to
    starts = ends - counts
    if left_padding:
        starts = starts + (length - ends[:, -1:])

    # `source[p]` is the token that expanded position p comes from, `within[p]` its place in that token's clip,
    # `target[p]` its place in the flattened result.
    flat_counts = counts.flatten()
    source = torch.arange(flat_counts.numel(), device=device).repeat_interleave(flat_counts)
    within = torch.arange(source.numel(), device=device) - (flat_counts.cumsum(0) - flat_counts)[source]
    target = (source // input_ids_BS.shape[1]) * length + starts.flatten()[source] + within

    from_in, from_out = is_in.flatten()[source], is_out.flatten()[source]
    from_text = ~(from_in | from_out)
    from_features = from_in & (within < num_features.flatten()[source])
    from_codes = from_in & ~from_features

    embeddings = text_embeddings_BSD.new_zeros(batch_size * length, text_embeddings_BSD.shape[-1])
    parts = [(from_text, text_embeddings_BSD.flatten(0, 1)[source[from_text]]), (from_out, audio_out.embeddings)]
    if audio_in_features is not None:
        parts.append((from_features, audio_in_features.embeddings))
    if audio_in_codes is not None:
        parts.append((from_codes, audio_in_codes.embeddings))
    for where, part in parts:
        embeddings = embeddings.index_copy(0, target[where], part.to(embeddings.dtype))

    def scattered(values: Tensor, fill: int | bool) -> Tensor:
        result = values.new_full((batch_size * length,), fill)
        result[target] = values
        return result.view(batch_size, length)

    flat_mask = attention_mask_BS.flatten()[source].bool() | ~from_text
    labels = None
    if labels_BS is not None:
        labels = scattered(
            labels_BS.flatten()[source].masked_fill(~from_text, tokens.IGNORE_INDEX), tokens.IGNORE_INDEX
        )
    merged = Merged(
        embeddings_BSD=embeddings.view(batch_size, length, -1),
        input_ids_BS=scattered(input_ids_BS.flatten()[source], config.pad_token_id or 0),
        attention_mask_BS=scattered(flat_mask, fill=False),
        labels_BS=labels,
        audio_in_mask_BS=scattered(from_in, fill=False),
        audio_in_codes_mask_BS=scattered(from_codes, fill=False),
        audio_out_mask_BS=scattered(from_out, fill=False),
    )
    return _trimmed(merged, left_padding, round_to)


def _trimmed(merged: Merged, left_padding: bool, round_to: int) -> Merged:
    """Without the columns that are padding in every row, in steps of `round_to`."""
    used = merged.attention_mask_BS.any(dim=0).nonzero().squeeze(1)
    length = merged.attention_mask_BS.shape[1]
    if left_padding:
        columns = slice(int(used[0]) // round_to * round_to, length)
    else:
        columns = slice(0, min(length, -(-(int(used[-1]) + 1) // round_to) * round_to))
    if columns == slice(0, length):
        return merged
    values = {f.name: getattr(merged, f.name) for f in dataclasses.fields(merged)}
    return Merged(**{name: None if value is None else value[:, columns] for name, value in values.items()})
