"""What is trained, from settings: a network and its tokenizer."""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import HiggsAudioV2Config, PreTrainedTokenizerBase

from higgs_model import demo, tokens
from higgs_model.checkpoint import load_tokenizer, locate
from higgs_model.config import HiggsAudioConfig, from_transformers_layout
from higgs_model.errors import BadConfig
from higgs_model.model.model import HiggsAudioModel
from higgs_model.script.prompt import END_OF_MESSAGE, Tokenizer
from higgs_model.training.settings import Init

_FROM_TOKENIZER = {
    "audio_in_token_idx": tokens.AUDIO_IN,
    "audio_out_token_idx": tokens.AUDIO_OUT,
    "audio_out_bos_token_id": tokens.AUDIO_OUT_BOS,
    "audio_eos_token_id": tokens.AUDIO_EOS,
    "pad_token_id": "<|end_of_text|>",
}
"""Ids of a configuration that are those of the tokenizer's tokens."""


@dataclasses.dataclass(frozen=True)
class Trainee:
    """What is trained: a network's configuration, and the tokenizer that goes with it; weights come later.

    Attributes:
        checkpoint: where the weights are; None: they are drawn.
    """

    config: HiggsAudioConfig
    tokenizer: Tokenizer
    checkpoint: Path | None = None

    @classmethod
    def of(cls, init: Init) -> Trainee:
        """Find them.

        Raises:
            BadCheckpoint: checkpoint or tokenizer are not there.
            BadConfig: the network contradicts itself or the tokenizer.
        """
        if init.checkpoint is not None:
            folder = locate(demo.located(init.checkpoint), revision=init.revision).directory
            tokenizer = load_tokenizer(folder if init.tokenizer is None else locate(init.tokenizer).directory)
            trainee = cls(HiggsAudioConfig.from_pretrained(folder), cast(Tokenizer, tokenizer), folder)
        else:
            tokenizer = load_tokenizer(locate(str(init.tokenizer)).directory)
            trainee = cls(_config(init.config, tokenizer), cast(Tokenizer, tokenizer))
        _check(trainee.config, tokenizer)
        return trainee

    def build(self, seed: int, device: torch.device) -> HiggsAudioModel:
        """The network in float32, its weights read, or drawn from the seed."""
        if self.checkpoint is not None:
            return HiggsAudioModel.from_pretrained(self.checkpoint, dtype=torch.float32, device=device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return HiggsAudioModel(self.config).to(device)

    def save_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer beside a checkpoint's weights."""
        cast(PreTrainedTokenizerBase, self.tokenizer).save_pretrained(folder)


def _config(given: str | dict[str, Any] | None, tokenizer: PreTrainedTokenizerBase) -> HiggsAudioConfig:
    """A network's configuration, what it leaves out taken from the tokenizer."""
    values = _read(given) if isinstance(given, str) else _known(dict(given or {}))
    if values.get("model_type") == HiggsAudioV2Config.model_type:
        return HiggsAudioConfig(**_without_type(from_transformers_layout(values)))
    added = tokenizer.get_added_vocab()
    for name, token in _FROM_TOKENIZER.items():
        if name not in values and token in added:
            values[name] = added[token]
    text = dict(values.get("text_config") or {})
    if not text:
        raise BadConfig("init.config has no text_config: say at least how wide and deep the backbone is")
    text.setdefault("vocab_size", len(cast(Any, tokenizer)))
    text.setdefault("eos_token_id", added.get(END_OF_MESSAGE))
    return HiggsAudioConfig(**_without_type({**values, "text_config": text}))


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """What stands in the settings themselves; a file may hold anything besides, as those of checkpoints do."""
    names = {field.name for field in dataclasses.fields(HiggsAudioConfig)}
    for name in values:
        if name not in names and values.get("model_type") != HiggsAudioV2Config.model_type and name != "model_type":
            near = difflib.get_close_matches(name, names, n=1)
            raise BadConfig(f"init.config has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return values


def _read(path: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadConfig(f"init.config {path!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise BadConfig(f"init.config {path!r} does not hold an object")
    return values


def _without_type(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in ("model_type", "architectures", "torch_dtype")}


def _check(config: HiggsAudioConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    added = tokenizer.get_added_vocab()
    for name, token in _FROM_TOKENIZER.items():
        found = getattr(config, name)
        if name != "pad_token_id" and added.get(token) not in (None, found):
            raise BadConfig(f"{name}={found}, but the tokenizer's {token} is {added[token]}")
    size, known = config.text_config.vocab_size, len(cast(Any, tokenizer))
    if size < known:
        raise BadConfig(f"text_config.vocab_size={size}, but the tokenizer has {known} tokens")
