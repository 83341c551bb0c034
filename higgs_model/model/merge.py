"""From prompts with one placeholder a clip to sequences with one position a frame or feature.

    input_ids            a b X c Y d        X is <|AUDIO_OUT|>, 3 frames; Y is <|AUDIO|>, 2 features and 2 codes
    expanded             a b X X X c Y Y Y Y d
    audio positions      . . o o o . . . i i .     o audio-out, i audio-in codes; features are text positions

Everything is computed at once for a batch of uneven samples, padded on either side. Where both are given, a clip's
features come before its codes. Nothing here embeds anything or checks what it is given (`inputs` does).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from higgs_model import tokens
from higgs_model.config import HiggsAudioConfig
from higgs_model.errors import BadInput

TRAINING_ROUND_TO = 8
"""Without a cache, expanded sequences are padded to a multiple of this, as the checkpoints were trained."""


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
    sample_ids_BS: Tensor | None = None

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


@dataclasses.dataclass(frozen=True)
class _Expansion:
    """Where everything goes. P counts the expanded positions of the whole batch, row after row.

    `source` (P,) is the token that a position comes from, `target` (P,) its place in the flattened (B, length) result;
    `from_text`, `from_features`, `from_codes`, `from_out` (P,) bool say what fills it.
    """

    length: int
    source: Tensor
    target: Tensor
    from_text: Tensor
    from_features: Tensor
    from_codes: Tensor
    from_out: Tensor


def _expand(
    config: HiggsAudioConfig,
    input_ids_BS: Tensor,
    num_features: Tensor | int,
    num_codes: Tensor | int,
    num_frames: Tensor,
    left_padding: bool,
    round_to: int,
) -> _Expansion:
    """Plan the expansion, from how many positions each clip has: of features, of codes, of audio-out frames."""
    is_in = input_ids_BS == config.audio_in_token_idx
    is_out = input_ids_BS == config.audio_out_token_idx
    counts, features = torch.ones_like(input_ids_BS), torch.zeros_like(input_ids_BS)
    features[is_in] = num_features
    counts[is_in] = features[is_in] + num_codes
    counts[is_out] = num_frames

    ends = counts.cumsum(dim=1)
    length = _rounded_up(int(ends[:, -1].max()), round_to)
    starts = ends - counts + ((length - ends[:, -1:]) if left_padding else 0)

    flat_counts, (batch_size, num_tokens) = counts.flatten(), input_ids_BS.shape
    token = torch.arange(batch_size * num_tokens, device=input_ids_BS.device)
    source = token.repeat_interleave(flat_counts)
    within_clip = torch.arange(source.numel(), device=source.device) - (flat_counts.cumsum(0) - flat_counts)[source]
    row_start = token // num_tokens * length
    from_in, from_out = is_in.flatten()[source], is_out.flatten()[source]
    from_features = from_in & (within_clip < features.flatten()[source])
    return _Expansion(
        length=length,
        source=source,
        target=(row_start + starts.flatten())[source] + within_clip,
        from_text=~(from_in | from_out),
        from_features=from_features,
        from_codes=from_in & ~from_features,
        from_out=from_out,
    )


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


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
    sample_ids_BS: Tensor | None = None,
) -> Merged:
    """Expand every placeholder to its clip.

    Args:
        input_ids_BS, attention_mask_BS, labels_BS: the prompts, with one placeholder a clip.
        text_embeddings_BSD: (B, S, D) embeddings of all tokens; those of placeholders are not used.
        left_padding: whether rows end or begin together.
        round_to: the expanded length is a multiple of this.
        sample_ids_BS: (B, S), which of the samples packed into its row a token belongs to.

    Raises:
        BadInput: a row has no position at all.
    """
    plan = _expand(
        config,
        input_ids_BS,
        audio_in_features.lengths if audio_in_features else 0,
        audio_in_codes.lengths if audio_in_codes else 0,
        audio_out.lengths,
        left_padding,
        round_to,
    )
    shape = (input_ids_BS.shape[0], plan.length)

    def placed(values: Tensor, fill: int | bool) -> Tensor:
        result = values.new_full((shape[0] * shape[1],), fill)
        result[plan.target] = values
        return result.view(shape)

    def of_tokens(values_BS: Tensor) -> Tensor:
        return values_BS.flatten()[plan.source]

    attended = placed(of_tokens(attention_mask_BS).bool() | ~plan.from_text, fill=False)
    if bool((empty := ~attended.any(dim=1)).any()):
        raise BadInput(f"the prompt in row {int(empty.nonzero()[0])} is empty: it is all clips without a frame")

    text = text_embeddings_BSD.flatten(0, 1)
    embeddings = text.new_zeros(shape[0] * shape[1], text.shape[1])
    parts = [(plan.from_text, text[plan.source[plan.from_text]]), (plan.from_out, audio_out.embeddings)]
    if audio_in_features is not None:
        parts.append((plan.from_features, audio_in_features.embeddings))
    if audio_in_codes is not None:
        parts.append((plan.from_codes, audio_in_codes.embeddings))
    for where, part in parts:
        embeddings = embeddings.index_copy(0, plan.target[where], part.to(embeddings.dtype))

    labels = None
    if labels_BS is not None:
        own = of_tokens(labels_BS).masked_fill(~plan.from_text, tokens.IGNORE_INDEX)
        labels = placed(own, tokens.IGNORE_INDEX)
    merged = Merged(
        embeddings_BSD=embeddings.view(*shape, -1),
        input_ids_BS=placed(of_tokens(input_ids_BS), config.pad_token_id or 0),
        attention_mask_BS=attended,
        labels_BS=labels,
        audio_in_mask_BS=placed(plan.from_features | plan.from_codes, fill=False),
        audio_in_codes_mask_BS=placed(plan.from_codes, fill=False),
        audio_out_mask_BS=placed(plan.from_out, fill=False),
        sample_ids_BS=None if sample_ids_BS is None else placed(of_tokens(sample_ids_BS), -1),
    )
    return _trimmed(merged, left_padding, round_to)


def _trimmed(merged: Merged, left_padding: bool, round_to: int) -> Merged:
    """Without the columns that are padding in every row, in steps of `round_to`."""
    used = merged.attention_mask_BS.any(dim=0).nonzero().squeeze(1)
    length = merged.attention_mask_BS.shape[1]
    if left_padding:
        columns = slice(int(used[0]) // round_to * round_to, length)
    else:
        columns = slice(0, _rounded_up(int(used[-1]) + 1, round_to))
    if columns == slice(0, length):
        return merged
    parts = {field.name: getattr(merged, field.name) for field in dataclasses.fields(merged)}
    cut: dict[str, Any] = {name: None if part is None else part[:, columns] for name, part in parts.items()}
    return Merged(**cut)
