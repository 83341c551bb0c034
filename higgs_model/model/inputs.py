"""Checks of what a caller passes, before anything is computed: what is wrong and where, in one sentence.

Only shapes, counts and ranges are looked at. On a GPU that costs a few waits for the device, which a prompt pays
once; the steps of a running generation are not checked.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from higgs_model import tokens
from higgs_model.config import HiggsAudioConfig
from higgs_model.errors import BadInput


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """A batch of prompts with their clips, checked and complete: what was left out is empty.

    Attributes:
        input_ids: (B, S) int64, one placeholder a clip.
        attention_mask: (B, S) int64, 1 at real tokens.
        audio_features: (clips, mel bins, mel frames), or None without an audio tower.
        audio_feature_attention_mask: (clips, mel frames).
        audio_in_ids, audio_out_ids: (K, frames of all clips) int64 in the form that the model sees: with stream
            tokens, delayed. `audio_in_ids` is None where recordings do not enter as codes.
        audio_in_ids_start, audio_out_ids_start: (clips,) int64, where each clip starts.
        label_ids: (B, S) int64 or None.
        label_audio_ids: (K, frames) int64 as `audio_out_ids`, or None.
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
    """Check a batch and move it to `device`. Arguments are those of `ModelInputs`, any of them left out.

    Raises:
        BadInput: the batch cannot be what the caller meant.
    """
    input_ids, attention_mask = _prompt(config, device, input_ids, attention_mask)
    num_in = int((input_ids == config.audio_in_token_idx).sum())
    num_out = int((input_ids == config.audio_out_token_idx).sum())

    # A network without the way in ignores what is meant for it, as the reference does.
    mels, mel_mask = None, None
    if not config.skip_audio_tower:
        mels, mel_mask = _features(config, device, audio_features, audio_feature_attention_mask)
    in_ids, in_start = None, None
    if config.encode_audio_in_tokens:
        in_ids, in_start = _clips(config, device, "audio_in_ids", audio_in_ids, audio_in_ids_start)
    out_ids, out_start = _clips(config, device, "audio_out_ids", audio_out_ids, audio_out_ids_start)

    _counts(config, num_in, mels, in_start)
    _match("audio_out_ids", out_start.numel(), config.audio_out_token, num_out)
    return ModelInputs(
        input_ids=input_ids,
        attention_mask=attention_mask,
        audio_features=mels,
        audio_feature_attention_mask=mel_mask,
        audio_in_ids=in_ids,
        audio_in_ids_start=in_start,
        audio_out_ids=out_ids,
        audio_out_ids_start=out_start,
        label_ids=_labels(device, "label_ids", label_ids, input_ids, config.text_config.vocab_size),
        label_audio_ids=_labels(device, "label_audio_ids", label_audio_ids, out_ids, config.num_codebook_rows),
    )


def _prompt(
    config: HiggsAudioConfig, device: torch.device, input_ids: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if input_ids is None or input_ids.numel() == 0:
        raise BadInput("the prompt is empty: input_ids need at least one token a row")
    _integers("input_ids", input_ids)
    if input_ids.dim() != 2:
        raise BadInput(f"input_ids have shape {_shape(input_ids)}, wanted (batch, tokens)")
    input_ids = input_ids.to(device, torch.int64)
    _in_range("input_ids", input_ids, config.text_config.vocab_size, "the vocabulary")
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise BadInput(f"attention_mask has shape {_shape(attention_mask)}, but input_ids have {_shape(input_ids)}")
    attention_mask = attention_mask.to(device).bool()
    placeholder = (input_ids == config.audio_in_token_idx) | (input_ids == config.audio_out_token_idx)
    if bool((hidden := placeholder & ~attention_mask).any()):
        row, column = hidden.nonzero()[0].tolist()
        raise BadInput(f"attention_mask hides the audio placeholder at row {row}, token {column} of input_ids")
    if bool((empty := ~attention_mask.any(dim=1)).any()):
        raise BadInput(f"the prompt in row {int(empty.nonzero()[0])} is empty: its attention_mask is all zero")
    return input_ids, attention_mask.long()


def _features(
    config: HiggsAudioConfig, device: torch.device, mels: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    encoder = config.audio_encoder_config
    if mels is None:
        mels = torch.zeros(0, encoder.num_mel_bins, 2 * encoder.max_source_positions)
    if mels.dim() != 3 or mels.shape[1] != encoder.num_mel_bins:
        raise BadInput(
            f"audio_features have shape {_shape(mels)}, wanted (clips, {encoder.num_mel_bins} mel bins, mel frames)"
        )
    mels = mels.to(device)
    if mask is None:
        mask = torch.ones(mels.shape[0], mels.shape[2])
    if mask.shape != (mels.shape[0], mels.shape[2]):
        raise BadInput(f"audio_feature_attention_mask has shape {_shape(mask)}, but audio_features have {_shape(mels)}")
    finite = torch.isfinite(mels).flatten(1).all(dim=1)
    if not bool(finite.all()):
        raise BadInput(f"audio_features of clip {int((~finite).nonzero()[0])} hold NaN or infinity")
    return mels, mask.to(device)


def _clips(
    config: HiggsAudioConfig, device: torch.device, name: str, codes: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    num_codebooks = config.audio_num_codebooks
    num_starts = 0 if starts is None else starts.numel()
    if codes is None or (codes.numel() == 0 and num_starts == 0):
        if num_starts:
            raise BadInput(f"{name}_start names {num_starts} clips, but {name} is missing")
        return (
            torch.zeros(num_codebooks, 0, dtype=torch.int64, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
        )
    _integers(name, codes)
    if codes.dim() != 2 or codes.shape[0] != num_codebooks:
        raise BadInput(f"{name} have shape {_shape(codes)}, wanted ({num_codebooks} codebooks, frames)")
    if starts is None or starts.dim() != 1 or not num_starts:
        found = "is missing" if starts is None else f"has shape {_shape(starts)}"
        raise BadInput(f"{name}_start {found}, wanted the start of each clip in {name}")
    _integers(f"{name}_start", starts)
    codes, starts = codes.to(device, torch.int64), starts.to(device, torch.int64)
    _in_range(name, codes, config.num_codebook_rows, "a codebook with its two stream tokens")
    bounds = torch.cat([starts, starts.new_tensor([codes.shape[1]])])
    if int(starts[0]) != 0 or bool((bounds.diff() < 0).any()):
        raise BadInput(
            f"{name}_start = {_few(starts)} must begin with 0, never fall, "
            f"and stay within the {codes.shape[1]} frames of {name}"
        )
    return codes, starts


def _counts(config: HiggsAudioConfig, num_in: int, mels: Tensor | None, in_start: Tensor | None) -> None:
    """Every recording's placeholder must have features, codes, or both."""
    given = {
        "audio_features": 0 if mels is None else mels.shape[0],
        "audio_in_ids": 0 if in_start is None else in_start.numel(),
    }
    for name, num_clips in given.items():
        if num_clips:
            _match(name, num_clips, config.audio_in_token, num_in)
    if num_in and not any(given.values()):
        raise BadInput(
            f"the prompt has {num_in} {config.audio_in_token} but no audio that this network can take: "
            f"it wants {_ways_in(config)}"
        )


def _ways_in(config: HiggsAudioConfig) -> str:
    ways = ["audio_features"] * (not config.skip_audio_tower) + ["audio_in_ids"] * config.encode_audio_in_tokens
    return " or ".join(ways) or "none (skip_audio_tower=True, encode_audio_in_tokens=False)"


def _match(name: str, num_clips: int, token: str, num_placeholders: int) -> None:
    if num_clips != num_placeholders:
        raise BadInput(f"{name} hold {num_clips} clips, but the prompt has {num_placeholders} {token}")


def _labels(device: torch.device, name: str, labels: Tensor | None, like: Tensor, size: int) -> Tensor | None:
    if labels is None:
        return None
    if labels.numel() == 0 and like.numel() == 0:
        return like
    _integers(name, labels)
    if labels.shape != like.shape:
        raise BadInput(f"{name} have shape {_shape(labels)}, wanted {_shape(like)}")
    labels = labels.to(device, torch.int64)
    _in_range(name, labels.masked_fill(labels == tokens.IGNORE_INDEX, 0), size, "what can be predicted")
    return labels


def _in_range(name: str, values: Tensor, size: int, what: str) -> None:
    bad = (values < 0) | (values >= size)
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        raise BadInput(f"{name}{list(at)} = {int(values[at])} is outside {what}: wanted 0 to {size - 1}")


def _integers(name: str, values: Tensor) -> None:
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        raise BadInput(f"{name} are {values.dtype}, wanted integers")


def _shape(values: Tensor) -> str:
    return f"({', '.join(map(str, values.shape))})"


def _few(values: Tensor) -> str:
    first = values[:8].tolist()
    return f"{first[:-1]}…" if values.numel() > len(first) else str(first)
