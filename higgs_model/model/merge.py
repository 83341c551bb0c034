"""From prompts with one placeholder a clip to sequences with one position a frame or feature.

    input_ids            a b X c Y d        X is <|AUDIO_OUT|>, 3 frames; Y is <|AUDIO|>, 2 features and 2 codes
    expanded             a b X X X c Y Y Y Y d
    audio positions      . . o o o . . . i i .     o audio-out, i audio-in codes; features are text positions

Everything is computed at once for a batch of uneven samples, padded on either side. Where both are given, a clip's
features come before its codes. `expand` decides what goes where and looks at values, on whatever device they are;
`Expansion.filled` follows it without a look. Nothing here embeds anything or checks what it is given (`inputs` does).
"""

from __future__ import annotations

import dataclasses

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
class Expansion:
    """A batch expanded, but for its embeddings: what stands where. S is the expanded length.

    `text_from` are the tokens, as indices into the flattened (B, tokens), that are no placeholders; `text_to` are their
    places in the flattened (B, S), and `features_to`, `codes_to`, `out_to` those of the clips' positions, in order.
    """

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    labels_BS: Tensor | None
    audio_in_mask_BS: Tensor
    audio_in_codes_mask_BS: Tensor
    audio_out_mask_BS: Tensor
    sample_ids_BS: Tensor | None
    text_from: Tensor
    text_to: Tensor
    features_to: Tensor
    codes_to: Tensor
    out_to: Tensor

    @property
    def audio_mask_BS(self) -> Tensor:
        """Positions that take the audio path: codes, in or out."""
        return self.audio_in_codes_mask_BS | self.audio_out_mask_BS

    def filled(
        self,
        text_embeddings_BSD: Tensor,
        *,
        audio_in_features: Tensor | None,
        audio_in_codes: Tensor | None,
        audio_out: Tensor,
    ) -> Tensor:
        """Embeddings (B, S, D) of everything; zero where there is padding.

        Args:
            text_embeddings_BSD: (B, tokens, D) of all tokens; those of placeholders are not used.
            audio_in_features, audio_in_codes, audio_out: (positions, D) of all clips of a kind.
        """
        text = text_embeddings_BSD.flatten(0, 1)
        embeddings = text.new_zeros(self.input_ids_BS.numel(), text.shape[1])
        parts = [(self.text_to, text[self.text_from]), (self.out_to, audio_out)]
        parts += [(self.features_to, audio_in_features)] if audio_in_features is not None else []
        parts += [(self.codes_to, audio_in_codes)] if audio_in_codes is not None else []
        for where, part in parts:
            embeddings = embeddings.index_copy(0, where, part.to(embeddings.dtype))
        return embeddings.view(*self.input_ids_BS.shape, -1)


def code_clips(embeddings: Tensor, starts: Tensor) -> Clips:
    """Clips given by where each starts in the concatenated codes."""
    ends = torch.cat([starts[1:], starts.new_tensor([embeddings.shape[0]])])
    return Clips(embeddings, ends - starts)


def feature_clips(features: Tensor, lengths: Tensor) -> Clips:
    """Clips of tower features (clips, positions, D), of which the first `lengths` are real."""
    real = torch.arange(features.shape[1], device=features.device) < lengths.unsqueeze(1)
    return Clips(features[real], lengths)


def expand(
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
    """Plan the expansion of every placeholder to its clip.

    Args:
        input_ids_BS, attention_mask_BS, labels_BS: the prompts, with one placeholder a clip.
        sample_ids_BS: which of the samples packed into its row a token belongs to.
        num_features, num_codes, num_frames: (clips,) positions of each clip: of features, of codes, of frames.
        left_padding: whether rows end or begin together.
        round_to: the expanded length is a multiple of this.

    Raises:
        BadInput: a row has no position at all.
    """
    is_in = input_ids_BS == config.audio_in_token_idx
    is_out = input_ids_BS == config.audio_out_token_idx
    counts, features = torch.ones_like(input_ids_BS), torch.zeros_like(input_ids_BS)
    features[is_in] = num_features
    counts[is_in] = features[is_in] + num_codes
    counts[is_out] = num_frames

    ends = counts.cumsum(dim=1)
    batch_size, num_tokens = input_ids_BS.shape
    length = _rounded_up(int(ends[:, -1].max()), round_to)
    starts = ends - counts + ((length - ends[:, -1:]) if left_padding else 0)

    # P counts the expanded positions of the whole batch, row after row: the token that each comes from, what it is, and
    # its row and column in the result.
    flat_counts = counts.flatten()
    source = torch.arange(batch_size * num_tokens, device=input_ids_BS.device).repeat_interleave(flat_counts)
    within_clip = torch.arange(source.numel(), device=source.device) - (flat_counts.cumsum(0) - flat_counts)[source]
    from_in, from_out = is_in.flatten()[source], is_out.flatten()[source]
    from_features = from_in & (within_clip < features.flatten()[source])
    from_text = ~(from_in | from_out)
    attended = attention_mask_BS.flatten()[source].bool() | ~from_text
    row, column = source // num_tokens, starts.flatten()[source] + within_clip

    first, stop = _used_columns(column, row, attended, (batch_size, length), left_padding, round_to)
    # What falls off is padding in every row.
    inside = (column >= first) & (column < stop)
    target = row * (stop - first) + column - first

    def placed(values: Tensor, fill: int | bool) -> Tensor:
        result = values.new_full((batch_size * (stop - first),), fill)
        result[target[inside]] = values[inside]
        return result.view(batch_size, stop - first)

    def of_tokens(values_BS: Tensor) -> Tensor:
        return values_BS.flatten()[source]

    labels = None if labels_BS is None else of_tokens(labels_BS).masked_fill(~from_text, tokens.IGNORE_INDEX)
    return Expansion(
        input_ids_BS=placed(of_tokens(input_ids_BS), config.pad_token_id or 0),
        attention_mask_BS=placed(attended, fill=False),
        labels_BS=None if labels is None else placed(labels, tokens.IGNORE_INDEX),
        audio_in_mask_BS=placed(from_in, fill=False),
        audio_in_codes_mask_BS=placed(from_in & ~from_features, fill=False),
        audio_out_mask_BS=placed(from_out, fill=False),
        sample_ids_BS=None if sample_ids_BS is None else placed(of_tokens(sample_ids_BS), -1),
        text_from=source[from_text & inside],
        text_to=target[from_text & inside],
        features_to=target[from_features],
        codes_to=target[from_in & ~from_features],
        out_to=target[from_out],
    )


def _used_columns(
    column: Tensor, row: Tensor, attended: Tensor, shape: tuple[int, int], left_padding: bool, round_to: int
) -> tuple[int, int]:
    """From where to where columns are real in any row, in steps of `round_to`."""
    used = torch.zeros(shape, dtype=torch.bool, device=column.device)
    used[row[attended], column[attended]] = True
    if bool((empty := ~used.any(dim=1)).any()):
        raise BadInput(f"the prompt in row {int(empty.nonzero()[0])} is empty: it is all clips without a frame")
    columns = used.any(dim=0).nonzero().squeeze(1)
    if left_padding:
        return int(columns[0]) // round_to * round_to, shape[1]
    return 0, _rounded_up(int(columns[-1]) + 1, round_to)


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
