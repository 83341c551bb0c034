"""Validation of the model's inputs before any computation; errors name what is wrong and where, in one sentence.

Checks types, shapes, counts and ranges, and that mel spectrograms are finite. On a GPU this costs a few
synchronisations with the device, once per prompt; decode steps are not checked.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from higgs_model import tokens
from higgs_model.config import HiggsAudioConfig
from higgs_model.errors import BadInput
from higgs_model.model.cache import KVCache


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """A validated batch of prompts with their clips. Omitted inputs are empty tensors.

    Attributes:
        input_ids: (B, S) int64, with one placeholder per clip.
        attention_mask: (B, S) int64, 1 for tokens and 0 for padding.
        audio_features: (clips, mel bins, mel frames), or None without an audio tower.
        audio_feature_attention_mask: (clips, mel frames) bool.
        audio_in_ids, audio_out_ids: (K, frames of all clips) int64 in delayed form, with stream tokens.
            `audio_in_ids` is None if the network does not take recordings as codes.
        audio_in_ids_start, audio_out_ids_start: (clips,) int64, first frame of each clip.
        label_ids: (B, S) int64 or None.
        label_audio_ids: (K, frames) int64, aligned with `audio_out_ids`, or None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    audio_features: Tensor | None
    audio_feature_attention_mask: Tensor | None
    audio_in_ids: Tensor | None
    audio_in_ids_start: Tensor | None
    audio_out_ids: Tensor
    audio_out_ids_start: Tensor
    label_ids: Tensor | None
    label_audio_ids: Tensor | None

    def left_padded(self) -> ModelInputs:
        """Return the batch with all padding on the left, so that every prompt ends in the last column.

        Labels, if any, are not moved.
        """
        order = self.attention_mask.argsort(dim=1, stable=True)
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.gather(1, order),
            attention_mask=self.attention_mask.gather(1, order),
        )


def check_inputs(
    config: HiggsAudioConfig,
    device: torch.device,
    *,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    audio_features: Tensor | None = None,
    audio_feature_attention_mask: Tensor | None = None,
    audio_in_ids: Tensor | None = None,
    audio_in_ids_start: Tensor | None = None,
    audio_out_ids: Tensor | None = None,
    audio_out_ids_start: Tensor | None = None,
    label_ids: Tensor | None = None,
    label_audio_ids: Tensor | None = None,
) -> ModelInputs:
    """Validate a batch and move it to `device`. The tensors are those of `ModelInputs`; None for an omitted one.

    Raises:
        BadInput: the batch is invalid.
    """
    _check_tensors(
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
    input_ids, attention_mask = _check_prompt(config, device, input_ids, attention_mask)
    num_in = int((input_ids == config.audio_in_token_idx).sum())
    num_out = int((input_ids == config.audio_out_token_idx).sum())

    # As in the reference, a network ignores inputs that it has no module for.
    mels, mel_mask = None, None
    if not config.skip_audio_tower:
        mels, mel_mask = _check_features(config, device, audio_features, audio_feature_attention_mask)
    in_ids, in_start = None, None
    if config.encode_audio_in_tokens:
        in_ids, in_start = _check_clips(config, device, "audio_in_ids", audio_in_ids, audio_in_ids_start)
    out_ids, out_start = _check_clips(config, device, "audio_out_ids", audio_out_ids, audio_out_ids_start)

    _check_recordings(config, num_in, mels, in_start)
    _check_clip_count("audio_out_ids", out_start.numel(), config.audio_out_token, num_out)
    return ModelInputs(
        input_ids=input_ids,
        attention_mask=attention_mask,
        audio_features=mels,
        audio_feature_attention_mask=mel_mask,
        audio_in_ids=in_ids,
        audio_in_ids_start=in_start,
        audio_out_ids=out_ids,
        audio_out_ids_start=out_start,
        label_ids=_check_labels(device, "label_ids", label_ids, input_ids, config.text_config.vocab_size),
        label_audio_ids=_check_labels(device, "label_audio_ids", label_audio_ids, out_ids, config.num_codebook_rows),
    )


def check_cache(cache: KVCache, batch_size: int) -> None:
    """Raise `BadInput` if a cache is not a `KVCache` or belongs to a batch of another size."""
    if not isinstance(cache, KVCache):
        raise BadInput(f"past_key_values is a {type(cache).__name__}, expected a higgs_model.model.KVCache")
    if cache.length and cache.attention_mask.shape[0] != batch_size:
        cached = cache.attention_mask.shape[0]
        raise BadInput(f"past_key_values holds a batch of {cached}, but input_ids has a batch of {batch_size}")


def _check_tensors(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise BadInput(f"{name} is a {type(value).__name__}, expected a torch.Tensor")


def _check_prompt(
    config: HiggsAudioConfig, device: torch.device, input_ids: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if input_ids is None or input_ids.numel() == 0:
        raise BadInput("the prompt is empty: input_ids needs at least one token per row")
    _check_integers("input_ids", input_ids)
    if input_ids.dim() != 2:
        raise BadInput(f"input_ids has shape {_shape(input_ids)}, expected (batch, tokens)")
    input_ids = input_ids.to(device, torch.int64)
    _check_range("input_ids", input_ids, config.text_config.vocab_size, "the vocabulary")
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise BadInput(f"attention_mask has shape {_shape(attention_mask)}, but input_ids has {_shape(input_ids)}")
    attention_mask = _to_bool_mask("attention_mask", attention_mask.to(device))
    placeholder = (input_ids == config.audio_in_token_idx) | (input_ids == config.audio_out_token_idx)
    if bool((masked := placeholder & ~attention_mask).any()):
        row, column = masked.nonzero()[0].tolist()
        raise BadInput(f"attention_mask masks the audio placeholder at row {row}, token {column} of input_ids")
    if bool((empty := ~attention_mask.any(dim=1)).any()):
        raise BadInput(f"the prompt in row {int(empty.nonzero()[0])} is empty: its attention_mask is all zeros")
    return input_ids, attention_mask.long()


def _check_features(
    config: HiggsAudioConfig, device: torch.device, mels: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    encoder = config.audio_encoder_config
    if mels is None:
        mels = torch.zeros(0, encoder.num_mel_bins, encoder.num_mel_frames)
    if mels.dim() != 3 or mels.shape[1] != encoder.num_mel_bins:
        raise BadInput(
            f"audio_features has shape {_shape(mels)}, expected (clips, {encoder.num_mel_bins} mel bins, mel frames)"
        )
    if mels.shape[0] and mels.shape[-1] != encoder.num_mel_frames:
        raise BadInput(
            f"audio_features has {mels.shape[-1]} mel frames, but the audio tower requires exactly "
            f"{encoder.num_mel_frames}: pad to that length"
        )
    mels = mels.to(device)
    if mask is None:
        mask = torch.ones(mels.shape[0], mels.shape[2])
    if mask.shape != (mels.shape[0], mels.shape[2]):
        raise BadInput(f"audio_feature_attention_mask has shape {_shape(mask)}, but audio_features has {_shape(mels)}")
    if not mels.dtype.is_floating_point:
        raise BadInput(f"audio_features has dtype {mels.dtype}, expected floating-point mel spectrograms")
    mask = _to_bool_mask("audio_feature_attention_mask", mask.to(device))
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise BadInput("audio_feature_attention_mask has a 1 after a 0: padding must follow the mel frames of a clip")
    finite = torch.isfinite(mels).flatten(1).all(dim=1)
    if not bool(finite.all()):
        raise BadInput(f"audio_features of clip {int((~finite).nonzero()[0])} contains NaN or infinity")
    return mels, mask


def _check_clips(
    config: HiggsAudioConfig, device: torch.device, name: str, codes: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    num_codebooks = config.audio_num_codebooks
    num_starts = 0 if starts is None else starts.numel()
    if codes is None or (codes.numel() == 0 and num_starts == 0):
        if num_starts:
            raise BadInput(f"{name}_start has {num_starts} clips, but {name} is missing")
        return (
            torch.zeros(num_codebooks, 0, dtype=torch.int64, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
        )
    _check_integers(name, codes)
    if codes.dim() != 2 or codes.shape[0] != num_codebooks:
        raise BadInput(f"{name} has shape {_shape(codes)}, expected ({num_codebooks} codebooks, frames)")
    if starts is None or starts.dim() != 1 or not num_starts:
        found = "is missing" if starts is None else f"has shape {_shape(starts)}"
        raise BadInput(f"{name}_start {found}, expected the first frame of each clip in {name}")
    _check_integers(f"{name}_start", starts)
    codes, starts = codes.to(device, torch.int64), starts.to(device, torch.int64)
    _check_range(name, codes, config.num_codebook_rows, "the codebook and its two stream tokens")
    bounds = torch.cat([starts, starts.new_tensor([codes.shape[1]])])
    if int(starts[0]) != 0 or bool((bounds.diff() < 0).any()):
        raise BadInput(
            f"{name}_start = {_format_values(starts)} must start with 0, never decrease, "
            f"and stay within the {codes.shape[1]} frames of {name}"
        )
    return codes, starts


def _check_recordings(config: HiggsAudioConfig, num_in: int, mels: Tensor | None, in_start: Tensor | None) -> None:
    """Check that the placeholder of every recording has features, codes, or both."""
    num_clips_by_input = {
        "audio_features": 0 if mels is None else mels.shape[0],
        "audio_in_ids": 0 if in_start is None else in_start.numel(),
    }
    for name, num_clips in num_clips_by_input.items():
        if num_clips:
            _check_clip_count(name, num_clips, config.audio_in_token, num_in)
    if num_in and not any(num_clips_by_input.values()):
        raise BadInput(
            f"the prompt has {num_in} {config.audio_in_token} but no audio for it: "
            f"this network takes {_supported_inputs(config)}"
        )


def _supported_inputs(config: HiggsAudioConfig) -> str:
    names = ["audio_features"] * (not config.skip_audio_tower) + ["audio_in_ids"] * config.encode_audio_in_tokens
    return " or ".join(names) or "none (skip_audio_tower=True, encode_audio_in_tokens=False)"


def _check_clip_count(name: str, num_clips: int, token: str, num_placeholders: int) -> None:
    if num_clips != num_placeholders:
        raise BadInput(f"{name}: {num_clips} given, but the prompt has {num_placeholders} {token}")


def _check_labels(device: torch.device, name: str, labels: Tensor | None, like: Tensor, size: int) -> Tensor | None:
    if labels is None:
        return None
    if labels.numel() == 0 and like.numel() == 0:
        return like
    _check_integers(name, labels)
    if labels.shape != like.shape:
        raise BadInput(f"{name} has shape {_shape(labels)}, expected {_shape(like)}")
    labels = labels.to(device, torch.int64)
    _check_range(name, labels.masked_fill(labels == tokens.IGNORE_INDEX, 0), size, "the predictable ids")
    return labels


def _to_bool_mask(name: str, mask: Tensor) -> Tensor:
    """Return the mask as bool."""
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise BadInput(f"{name} has values other than 0 and 1")
    return mask.bool()


def _check_range(name: str, values: Tensor, size: int, what: str) -> None:
    out_of_range = (values < 0) | (values >= size)
    if bool(out_of_range.any()):
        index = tuple(out_of_range.nonzero()[0].tolist())
        raise BadInput(f"{name}{list(index)} = {int(values[index])} is outside {what}: expected 0 to {size - 1}")


def _check_integers(name: str, values: Tensor) -> None:
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        raise BadInput(f"{name} has dtype {values.dtype}, expected integers")


def _shape(values: Tensor) -> str:
    return f"({', '.join(map(str, values.shape))})"


def _format_values(values: Tensor) -> str:
    first = values[:8].tolist()
    return f"{first[:-1]}…" if values.numel() > len(first) else str(first)
