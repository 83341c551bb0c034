"""The two layouts in which Higgs Audio checkpoints are published, as names of tensors, and loading and saving them.

The model's own names are those of the original layout. The transformers layout puts the backbone under `model.`, and
the heads at the top. A checkpoint that was saved with partially frozen rows holds a pair where others hold one tensor.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from transformers import HiggsAudioV2Config

from higgs_model import checkpoint
from higgs_model.config import HiggsAudioConfig, to_original_layout, to_transformers_layout
from higgs_model.errors import BadCheckpoint, BadConfig

if TYPE_CHECKING:
    from higgs_model.model.network import HiggsAudioNetwork

Layout = Literal["original", "transformers"]
NetworkT = TypeVar("NetworkT", bound="HiggsAudioNetwork")

TEXT_HEAD = "audio_decoder_proj.text_lm_head.weight"

# Prefixes that differ between the layouts: the original's, and the transformers'.
_PREFIXES = (
    ("audio_codebook_embeddings.", "model.embed_audio_tokens.embed_audio_tokens."),
    ("audio_decoder_proj.", ""),
    ("embed_tokens.", "model.embed_tokens."),
    ("layers.", "model.layers."),
    ("norm.", "model.norm."),
)

# Tensors that older versions stored and that follow from the configuration.
_DERIVED = (
    "audio_codebook_weights",
    "rotary_emb.inv_freq",
    "rotary_emb.original_inv_freq",
    "model.rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq",
    "model.embed_audio_tokens.audio_tokens_offsets",
)

# Modules that may be split into frozen and trainable rows, and how their halves are called.
_SPLIT = {
    "embed_tokens": "embedding",
    "audio_decoder_proj.text_lm_head": "linear",
    "audio_decoder_proj.audio_lm_head": "linear",
}


def transformers_name(name: str) -> str:
    """A tensor's name in the transformers layout, from that in the original's."""
    for ours, theirs in _PREFIXES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _halves(name: str) -> list[str] | None:
    module = name.removesuffix(".weight")
    kind = _SPLIT.get(module)
    return [f"{module}.{kind}_frozen.weight", f"{module}.{kind}_trainable.weight"] if kind else None


def load_model(
    model_class: type[NetworkT],
    path_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    revision: str | None,
    local_files_only: bool,
    attn_implementation: str | None,
) -> NetworkT:
    """Build and fill a model from a checkpoint of either layout; see `HiggsAudioModel.from_pretrained`."""
    target = _device(device)
    location = checkpoint.locate(path_or_hub_id, revision=revision, local_files_only=local_files_only)
    config, layout = _read_config(location.directory)
    files = checkpoint.TensorFiles(location.directory)
    if layout == "transformers":
        config.use_text_head = transformers_name(TEXT_HEAD) in files.shapes
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    config.dtype = _dtype(dtype, config, files)
    with torch.device("meta"):
        model = model_class(config)
    names = {}
    for name in model.state_dict():
        pair = _halves(name) if layout == "original" else None
        stored = transformers_name(name) if layout == "transformers" else name
        names[name] = pair if pair and pair[0] in files.shapes else [stored]
    checkpoint.load_tensors(model, files, names, ignored=_DERIVED, device=target, dtype=config.dtype)
    model.reset_buffers()
    model.revision = location.revision
    return model.eval()


def _device(given: torch.device | str | None) -> torch.device:
    try:
        device = torch.device(given or "cpu")
    except (RuntimeError, TypeError) as error:
        raise BadConfig(f"device={given!r} is not a device of torch") from error
    if device.type == "meta" or (device.type == "cuda" and not torch.cuda.is_available()):
        raise BadConfig(f"device={given!r} cannot hold weights here")
    return device


def _read_config(directory: Path) -> tuple[HiggsAudioConfig, Layout]:
    path = directory / "config.json"
    if not path.is_file():
        raise BadCheckpoint(f"{directory} has no config.json")
    values = _read_json(path)
    known: dict[str, Layout] = {
        HiggsAudioConfig.model_type: "original",
        HiggsAudioV2Config.model_type: "transformers",
    }
    model_type = values.get("model_type")
    if model_type not in known:
        raise BadCheckpoint(f"{path} has model_type {model_type!r}, wanted one of {', '.join(known)}")
    config = HiggsAudioConfig.from_pretrained(directory)
    generation = directory / "generation_config.json"
    if config.eos_token_id is None and generation.is_file():
        config.eos_token_id = _read_json(generation).get("eos_token_id")
    return config, known[model_type]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise BadCheckpoint(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise BadCheckpoint(f"{path} does not hold an object")
    return values


def _dtype(given: torch.dtype | str | None, config: HiggsAudioConfig, files: checkpoint.TensorFiles) -> torch.dtype:
    if given in (None, "auto"):
        given = config.dtype or files.dtype()
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise BadConfig(f"dtype={given!r} is not a floating-point type of torch")
    return dtype


def save_model(
    model: HiggsAudioNetwork,
    directory: str | Path,
    *,
    layout: Layout,
    max_shard_size: int | str,
    state: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint; see `HiggsAudioModel.save_pretrained`."""
    if layout not in ("original", "transformers"):
        raise BadConfig(f"layout={layout!r} is unknown, wanted original or transformers")
    directory = Path(directory)
    config = copy.deepcopy(model.config)
    config.dtype = dtype or next(model.parameters()).dtype
    if layout == "transformers":
        values = to_transformers_layout(config).to_dict()
        values["architectures"] = ["HiggsAudioV2ForConditionalGeneration"]
    else:
        values = to_original_layout(config)
        values["architectures"] = ["HiggsAudioModel"]
    state = _joined_state(dict(model.state_dict()) if state is None else dict(state))
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if layout == "transformers":
        state = {transformers_name(name): tensor for name, tensor in state.items()}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True, default=_plain) + "\n")
    checkpoint.save_tensors(state, directory, max_shard_size)


def _joined_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's tensors, with split rows joined again."""
    for module in _SPLIT:
        pair = _halves(f"{module}.weight")
        if pair and pair[0] in state:
            state[f"{module}.weight"] = torch.cat([state.pop(half) for half in pair])
    return state


def _plain(value: object) -> str:
    return str(value).removeprefix("torch.")
