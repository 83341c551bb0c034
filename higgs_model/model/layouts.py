"""Loading and saving of Higgs Audio checkpoints in the two published layouts, which differ in their tensor names.

The module's names are those of the original layout. The transformers layout has the backbone under `model.` and the
heads at the top level. A checkpoint with partially frozen rows stores a pair of tensors in place of one.
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

# Prefixes that differ between the layouts: (original, transformers).
_PREFIXES = (
    ("audio_codebook_embeddings.", "model.embed_audio_tokens.embed_audio_tokens."),
    ("audio_decoder_proj.", ""),
    ("embed_tokens.", "model.embed_tokens."),
    ("layers.", "model.layers."),
    ("norm.", "model.norm."),
)

# Tensors of older checkpoints that are computed from the configuration now.
_IGNORED_TENSORS = (
    "audio_codebook_weights",
    "rotary_emb.inv_freq",
    "rotary_emb.original_inv_freq",
    "model.rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq",
    "model.embed_audio_tokens.audio_tokens_offsets",
)

# Modules that may be split into frozen and trainable rows, and the prefix of the names of both parts.
_SPLIT_PREFIXES = {
    "embed_tokens": "embedding",
    "audio_decoder_proj.text_lm_head": "linear",
    "audio_decoder_proj.audio_lm_head": "linear",
}


def to_transformers_name(name: str) -> str:
    """Translate a tensor's name from the original to the transformers layout."""
    for original, transformers in _PREFIXES:
        if name.startswith(original):
            return transformers + name.removeprefix(original)
    return name


def _split_names(name: str) -> list[str] | None:
    module = name.removesuffix(".weight")
    prefix = _SPLIT_PREFIXES.get(module)
    return [f"{module}.{prefix}_frozen.weight", f"{module}.{prefix}_trainable.weight"] if prefix else None


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
    """Load a model from a checkpoint in either layout; see `HiggsAudioModel.from_pretrained`."""
    target_device = _parse_device(device)
    location = checkpoint.resolve_checkpoint(path_or_hub_id, revision=revision, local_files_only=local_files_only)
    config, layout = _read_config(location.directory)
    files = checkpoint.SafetensorsFiles(location.directory)
    if layout == "transformers":
        config.use_text_head = to_transformers_name(TEXT_HEAD) in files.shapes
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    config.dtype = _resolve_dtype(dtype, config, files)
    with torch.device("meta"):
        model = model_class(config)
    stored_names = {}
    for name in model.state_dict():
        pair = _split_names(name) if layout == "original" else None
        stored = to_transformers_name(name) if layout == "transformers" else name
        stored_names[name] = pair if pair and pair[0] in files.shapes else [stored]
    checkpoint.load_tensors(
        model, files, stored_names, ignored=_IGNORED_TENSORS, device=target_device, dtype=config.dtype
    )
    model.reset_buffers()
    model.revision = location.revision
    return model.eval()


def _parse_device(device: torch.device | str | None) -> torch.device:
    try:
        parsed = torch.device(device or "cpu")
    except (RuntimeError, TypeError) as error:
        raise BadConfig(f"device={device!r} is not a torch device") from error
    if parsed.type == "meta" or (parsed.type == "cuda" and not torch.cuda.is_available()):
        raise BadConfig(f"device={device!r} cannot hold weights on this machine")
    return parsed


def _read_config(directory: Path) -> tuple[HiggsAudioConfig, Layout]:
    path = directory / "config.json"
    if not path.is_file():
        raise BadCheckpoint(f"{directory} has no config.json")
    values = _read_json(path)
    layouts: dict[str, Layout] = {
        HiggsAudioConfig.model_type: "original",
        HiggsAudioV2Config.model_type: "transformers",
    }
    model_type = values.get("model_type")
    if model_type not in layouts:
        raise BadCheckpoint(f"{path} has model_type {model_type!r}, expected one of {', '.join(layouts)}")
    config = HiggsAudioConfig.from_pretrained(directory)
    generation_config = directory / "generation_config.json"
    if config.eos_token_id is None and generation_config.is_file():
        config.eos_token_id = _read_json(generation_config).get("eos_token_id")
    return config, layouts[model_type]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise BadCheckpoint(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise BadCheckpoint(f"{path} is not a JSON object")
    return values


def _resolve_dtype(
    dtype: torch.dtype | str | None, config: HiggsAudioConfig, files: checkpoint.SafetensorsFiles
) -> torch.dtype:
    if dtype in (None, "auto"):
        dtype = config.dtype or files.weight_dtype()
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise BadConfig(f"dtype={dtype!r} is not a floating-point dtype of torch")
    return resolved


def save_model(
    model: HiggsAudioNetwork,
    directory: str | Path,
    *,
    layout: Layout,
    max_shard_size: int | str,
    state: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Save a checkpoint; see `HiggsAudioModel.save_pretrained`."""
    if layout not in ("original", "transformers"):
        raise BadConfig(f"layout={layout!r} is unknown, expected original or transformers")
    directory = Path(directory)
    config = copy.deepcopy(model.config)
    config.dtype = dtype or next(model.parameters()).dtype
    if layout == "transformers":
        values = to_transformers_layout(config).to_dict()
        values["architectures"] = ["HiggsAudioV2ForConditionalGeneration"]
    else:
        values = to_original_layout(config)
        values["architectures"] = ["HiggsAudioModel"]
    state = _merge_split_rows(dict(model.state_dict()) if state is None else dict(state))
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if layout == "transformers":
        state = {to_transformers_name(name): tensor for name, tensor in state.items()}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True, default=_json_default) + "\n")
    checkpoint.save_tensors(state, directory, max_shard_size)


def _merge_split_rows(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Concatenate frozen and trainable rows in a state dict, in place, and return it."""
    for module in _SPLIT_PREFIXES:
        pair = _split_names(f"{module}.weight")
        if pair and pair[0] in state:
            state[f"{module}.weight"] = torch.cat([state.pop(half) for half in pair])
    return state


def _json_default(value: object) -> str:
    return str(value).removeprefix("torch.")
