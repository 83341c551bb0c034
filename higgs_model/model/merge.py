"""Expansion of prompts with one placeholder per clip to sequences with one position per frame or feature.

    input_ids            a b X c Y d        X is <|AUDIO_OUT|>, 3 frames; Y is <|AUDIO|>, 2 features and 2 codes
    expanded             a b X X X c Y Y Y Y d
    audio positions      . . o o o . . . i i .     o audio-out, i audio-in codes; features are text positions

A batch of samples of different lengths, padded on either side, is expanded at once. If a recording has both, its
features precede its codes. `expand_placeholders` computes all indices and synchronises with the device;
`Expansion.merge_embeddings` applies them without synchronising. Nothing here embeds or validates inputs (see `inputs`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from higgs_model import tokens
from higgs_model.config import HiggsAudioConfig
from higgs_model.errors import BadInput

TRAINING_ROUND_TO = 8
"""Without a cache, expanded sequences are padded to a multiple of this, as in the training of the checkpoints."""


@dataclasses.dataclass(frozen=True)
class Clips:
    """Embeddings for all placeholders of one kind, in the order of the batch.

    Attributes:
        embeddings: (positions of all clips, D), concatenated.
        lengths: (clips,) int64.
    """

    embeddings: Tensor
    lengths: Tensor


@dataclasses.dataclass(frozen=True)
class Expansion:
    """An expanded batch without its embeddings. S is the expanded length.

    Attributes:
        input_ids_BS: token ids, placeholders repeated.
        attention_mask_BS: bool, positions that are not padding.
        labels_BS: text labels, or None.
        audio_in_mask_BS, audio_in_codes_mask_BS, audio_out_mask_BS: bool, positions of recordings, of their codes, and
            of clips of frames.
        sample_ids_BS: ids of packed samples, or None.
        text_token_indices: tokens that are not placeholders, as indices into the flattened (B, tokens).
        text_positions: their positions in the flattened (B, S).
        feature_positions, audio_in_code_positions, audio_out_positions: positions of the clips' embeddings in the
            flattened (B, S), in order.
    """

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    labels_BS: Tensor | None
    audio_in_mask_BS: Tensor
    audio_in_codes_mask_BS: Tensor
    audio_out_mask_BS: Tensor
    sample_ids_BS: Tensor | None
    text_token_indices: Tensor
    text_positions: Tensor
    feature_positions: Tensor
    audio_in_code_positions: Tensor
    audio_out_positions: Tensor

    @property
    def audio_mask_BS(self) -> Tensor:
        """Positions that take the audio path: codes of recordings and of clips."""
        return self.audio_in_codes_mask_BS | self.audio_out_mask_BS

    def merge_embeddings(
        self,
        text_embeddings_BSD: Tensor,
        *,
        audio_in_features: Tensor | None,
        audio_in_codes: Tensor | None,
        audio_out: Tensor,
    ) -> Tensor:
        """Return the embeddings (B, S, D) of all positions; zero for padding.

        Args:
            text_embeddings_BSD: (B, tokens, D) of all tokens; those of placeholders are ignored.
            audio_in_features, audio_in_codes, audio_out: (positions, D) of all clips of each kind.
        """
        text = text_embeddings_BSD.flatten(0, 1)
        embeddings = text.new_zeros(self.input_ids_BS.numel(), text.shape[1])
        parts = [(self.text_positions, text[self.text_token_indices]), (self.audio_out_positions, audio_out)]
        parts += [(self.feature_positions, audio_in_features)] if audio_in_features is not None else []
        parts += [(self.audio_in_code_positions, audio_in_codes)] if audio_in_codes is not None else []
        for positions, part in parts:
            embeddings = embeddings.index_copy(0, positions, part.to(embeddings.dtype))
        return embeddings.view(*self.input_ids_BS.shape, -1)


def clips_from_starts(embeddings: Tensor, starts: Tensor) -> Clips:
    """Build `Clips` from concatenated embeddings and the first position of each clip."""
    ends = torch.cat([starts[1:], starts.new_tensor([embeddings.shape[0]])])
    return Clips(embeddings, ends - starts)


def clips_from_features(features: Tensor, lengths: Tensor) -> Clips:
    """Build `Clips` from padded features (clips, positions, D) and the length of each."""
    mask = torch.arange(features.shape[1], device=features.device) < lengths.unsqueeze(1)
    return Clips(features[mask], lengths)


def expand_placeholders(
    config: HiggsAudioConfig,
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor,
    labels_BS: Tensor | None = None,
    sample_ids_BS: Tensor | None = None,
    *,
    num_features: Tensor | int,
    num_codes: Tensor | int,
    num_frames: Tensor,
    left_padding: bool,
    round_to: int,
) -> Expansion:
    """Expand every placeholder to the positions of its clip.

    Args:
        config: ids of the placeholders and of padding.
        input_ids_BS, attention_mask_BS, labels_BS: the prompts, with one placeholder per clip.
        sample_ids_BS: the packed sample that each token belongs to; None without packing.
        num_features, num_codes, num_frames: (clips,) positions of each recording's features and codes, and of each
            clip's frames.
        left_padding: pad rows on the left instead of on the right.
        round_to: round the expanded length up to a multiple of this.

    Raises:
        BadInput: a row expands to no positions.
    """
    is_in = input_ids_BS == config.audio_in_token_idx
    is_out = input_ids_BS == config.audio_out_token_idx
    counts, features = torch.ones_like(input_ids_BS), torch.zeros_like(input_ids_BS)
    features[is_in] = num_features
    counts[is_in] = features[is_in] + num_codes
    counts[is_out] = num_frames

    ends = counts.cumsum(dim=1)
    batch_size, num_tokens = input_ids_BS.shape
    length = _round_up(int(ends[:, -1].max()), round_to)
    starts = ends - counts + ((length - ends[:, -1:]) if left_padding else 0)

    # For each expanded position of the batch, row by row: its source token, its kind, and its row and column in the
    # result.
    flat_counts = counts.flatten()
    source = torch.arange(batch_size * num_tokens, device=input_ids_BS.device).repeat_interleave(flat_counts)
    within_clip = torch.arange(source.numel(), device=source.device) - (flat_counts.cumsum(0) - flat_counts)[source]
    from_in, from_out = is_in.flatten()[source], is_out.flatten()[source]
    from_features = from_in & (within_clip < features.flatten()[source])
    from_text = ~(from_in | from_out)
    attended = attention_mask_BS.flatten()[source].bool() | ~from_text
    row, column = source // num_tokens, starts.flatten()[source] + within_clip

    first, stop = _used_columns(column, row, attended, (batch_size, length), left_padding, round_to)
    # Columns outside of this range are padding in every row.
    in_range = (column >= first) & (column < stop)
    target = row * (stop - first) + column - first

    def scatter(values: Tensor, fill: int | bool) -> Tensor:
        result = values.new_full((batch_size * (stop - first),), fill)
        result[target[in_range]] = values[in_range]
        return result.view(batch_size, stop - first)

    def gather(values_BS: Tensor) -> Tensor:
        return values_BS.flatten()[source]

    labels = None if labels_BS is None else gather(labels_BS).masked_fill(~from_text, tokens.IGNORE_INDEX)
    return Expansion(
        input_ids_BS=scatter(gather(input_ids_BS), config.pad_token_id or 0),
        attention_mask_BS=scatter(attended, fill=False),
        labels_BS=None if labels is None else scatter(labels, tokens.IGNORE_INDEX),
        audio_in_mask_BS=scatter(from_in, fill=False),
        audio_in_codes_mask_BS=scatter(from_in & ~from_features, fill=False),
        audio_out_mask_BS=scatter(from_out, fill=False),
        sample_ids_BS=None if sample_ids_BS is None else scatter(gather(sample_ids_BS), -1),
        text_token_indices=source[from_text & in_range],
        text_positions=target[from_text & in_range],
        feature_positions=target[from_features],
        audio_in_code_positions=target[from_in & ~from_features],
        audio_out_positions=target[from_out],
    )


def _used_columns(
    column: Tensor, row: Tensor, attended: Tensor, shape: tuple[int, int], left_padding: bool, round_to: int
) -> tuple[int, int]:
    """Return the range of columns that at least one row uses, rounded outwards to `round_to`."""
    used = torch.zeros(shape, dtype=torch.bool, device=column.device)
    used[row[attended], column[attended]] = True
    if bool((empty := ~used.any(dim=1)).any()):
        raise BadInput(f"the prompt in row {int(empty.nonzero()[0])} is empty: it consists of clips without frames")
    columns = used.any(dim=0).nonzero().squeeze(1)
    if left_padding:
        return int(columns[0]) // round_to * round_to, shape[1]
    return 0, _round_up(int(columns[-1]) + 1, round_to)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
