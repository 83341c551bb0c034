"""The model to train and its tokenizer, from settings."""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import HiggsAudioV2Config, PreTrainedTokenizerBase

from higgs_model import demo, tokens
from higgs_model.checkpoint import load_tokenizer, resolve_checkpoint
from higgs_model.config import HiggsAudioConfig, from_transformers_layout
from higgs_model.errors import BadConfig
from higgs_model.model.model import HiggsAudioModel
from higgs_model.script.prompt import END_OF_TURN, Tokenizer
from higgs_model.training.settings import InitSettings

_FROM_TOKENIZER = {
    "audio_in_token_idx": tokens.AUDIO_IN,
    "audio_out_token_idx": tokens.AUDIO_OUT,
    "audio_out_bos_token_id": tokens.AUDIO_OUT_BOS,
    "audio_eos_token_id": tokens.AUDIO_EOS,
    "pad_token_id": "<|end_of_text|>",
}
"""Token ids of the configuration that default to ids of the tokenizer."""


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Configuration and tokenizer of the model to train; `build` loads or initializes the weights.

    Attributes:
        config: the model's configuration.
        tokenizer: its tokenizer.
        checkpoint: folder of the weights; None: random initialization.
    """

    config: HiggsAudioConfig
    tokenizer: Tokenizer
    checkpoint: Path | None = None

    @classmethod
    def from_settings(cls, init: InitSettings) -> ModelSource:
        """Resolve the settings' checkpoint or configuration, and the tokenizer.

        Raises:
            BadCheckpoint: checkpoint or tokenizer are not found.
            BadConfig: the configuration is invalid or does not match the tokenizer.
        """
        if init.checkpoint is not None:
            folder = resolve_checkpoint(demo.resolve_model(init.checkpoint), revision=init.revision).directory
            tokenizer = load_tokenizer(
                folder if init.tokenizer is None else resolve_checkpoint(init.tokenizer).directory
            )
            source = cls(HiggsAudioConfig.from_pretrained(folder), cast(Tokenizer, tokenizer), folder)
        else:
            tokenizer = load_tokenizer(resolve_checkpoint(str(init.tokenizer)).directory)
            source = cls(_build_config(init.config, tokenizer), cast(Tokenizer, tokenizer))
        _check_tokenizer(source.config, tokenizer)
        return source

    def build(self, seed: int, device: torch.device) -> HiggsAudioModel:
        """Build the model in float32 with the checkpoint's weights, or initialized with the seed."""
        if self.checkpoint is not None:
            return HiggsAudioModel.from_pretrained(self.checkpoint, dtype=torch.float32, device=device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return HiggsAudioModel(self.config).to(device)

    def save_tokenizer(self, folder: Path) -> None:
        """Save the tokenizer into a checkpoint's folder."""
        cast(PreTrainedTokenizerBase, self.tokenizer).save_pretrained(folder)


def _build_config(inline_or_path: str | dict[str, Any] | None, tokenizer: PreTrainedTokenizerBase) -> HiggsAudioConfig:
    """Return a model configuration; missing token ids and vocabulary size are taken from the tokenizer."""
    values = _read_json(inline_or_path) if isinstance(inline_or_path, str) else _check_keys(dict(inline_or_path or {}))
    if values.get("model_type") == HiggsAudioV2Config.model_type:
        return HiggsAudioConfig(**_without_type(from_transformers_layout(values)))
    added = tokenizer.get_added_vocab()
    for name, token in _FROM_TOKENIZER.items():
        if name not in values and token in added:
            values[name] = added[token]
    text = dict(values.get("text_config") or {})
    if not text:
        raise BadConfig("init.config: text_config is missing; set at least the width and depth of the backbone")
    text.setdefault("vocab_size", len(cast(Any, tokenizer)))
    text.setdefault("eos_token_id", added.get(END_OF_TURN))
    return HiggsAudioConfig(**_without_type({**values, "text_config": text}))


def _check_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Reject unknown keys of an inline configuration; files may have more keys, as those of checkpoints do."""
    names = {field.name for field in dataclasses.fields(HiggsAudioConfig)}
    for name in values:
        if name not in names and values.get("model_type") != HiggsAudioV2Config.model_type and name != "model_type":
            near = difflib.get_close_matches(name, names, n=1)
            raise BadConfig(f"init.config: unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return values


def _read_json(path: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadConfig(f"init.config {path!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise BadConfig(f"init.config {path!r} is not a JSON object")
    return values


def _without_type(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in ("model_type", "architectures", "torch_dtype")}


def _check_tokenizer(config: HiggsAudioConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    added = tokenizer.get_added_vocab()
    for name, token in _FROM_TOKENIZER.items():
        configured = getattr(config, name)
        if name != "pad_token_id" and added.get(token) not in (None, configured):
            raise BadConfig(f"{name}={configured}, but the tokenizer's {token} is {added[token]}")
    vocab_size, num_tokens = config.text_config.vocab_size, len(cast(Any, tokenizer))
    if vocab_size < num_tokens:
        raise BadConfig(f"text_config.vocab_size={vocab_size}, but the tokenizer has {num_tokens} tokens")
