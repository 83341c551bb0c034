"""Codec checkpoints in both layouts.

* Original: `config.json`, and `model.pth` with all tensors including the semantic model's, weight-normalized
  convolutions as pairs; `semantic_config.json` with the semantic model's configuration unless it is HuBERT-base.
* transformers: `config.json` (`model_type: higgs_audio_v2_tokenizer`) and `model.safetensors`, possibly sharded.

In: a local folder. Out: the configuration and a state dictionary with internal names, which `load_state` validates
against the network. `model.pth` is read with `weights_only`; a pickle with anything but tensors is rejected. Nothing is
downloaded here. Every error is a `BadCheckpoint` that names the file.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from higgs_model.checkpoint import SINGLE_FILE, CheckpointLocation, SafetensorsFiles
from higgs_model.codec import config as configs
from higgs_model.codec.config import HiggsAudioCodecConfig
from higgs_model.codec.names import State, fold_weight_norm, internal_name, original_name, unfold_weight_norm
from higgs_model.errors import BadCheckpoint

Layout = Literal["transformers", "original"]

_CONFIG, _SEMANTIC_CONFIG, _ORIGINAL_WEIGHTS = "config.json", "semantic_config.json", "model.pth"
_TRANSFORMERS_MODEL_TYPE = "higgs_audio_v2_tokenizer"
_MASK_EMBEDDING = "semantic_model.masked_spec_embed"
"""Replaces masked features in training of the semantic model, which is frozen here."""
_POSITION_CONV = "semantic_model.encoder.pos_conv_embed.conv."
"""The semantic model's only weight-normalized convolution; its magnitudes are along the taps (axis 2)."""


def read_checkpoint(location: CheckpointLocation) -> tuple[HiggsAudioCodecConfig, State]:
    """Read a checkpoint in either layout.

    Returns:
        The configuration, and the tensors on the CPU with internal names and weight norm folded.
    """
    folder = location.directory
    raw = _read_json(folder / _CONFIG)
    if raw.get("model_type") == _TRANSFORMERS_MODEL_TYPE:
        files = SafetensorsFiles(folder)
        state = files.read(files.shapes, "cpu", None)
        num_codebooks = len({name.split(".")[2] for name in state if name.startswith("quantizer.quantizers.")})
        return configs.from_transformers(raw, num_codebooks), _fold(state)
    return _read_original(folder, raw)


def _read_original(folder: Path, raw: Mapping[str, Any]) -> tuple[HiggsAudioCodecConfig, State]:
    weights = folder / _ORIGINAL_WEIGHTS
    state = _read_tensors_only(weights)
    for name in ("encoder.block.0.bias", "decoder_2.model.0.bias", "encoder_semantic.conv.conv.weight"):
        if name not in state:
            raise BadCheckpoint(f"{weights}: tensor {name!r} is missing; this is not a Higgs Audio codec.")
    path = folder / _SEMANTIC_CONFIG
    semantic = configs.semantic_config(_read_json(path)) if path.exists() else None
    config = configs.from_original(raw, semantic, {name: tuple(tensor.shape) for name, tensor in state.items()})
    return config, _fold({internal_name(name, len(config.ratios)): tensor for name, tensor in state.items()})


def _fold(state: Mapping[str, Tensor]) -> State:
    folded = fold_weight_norm(state)
    folded.pop(_MASK_EMBEDDING, None)
    return folded


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: file not found; every codec checkpoint has one.") from None
    except ValueError as error:
        raise BadCheckpoint(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise BadCheckpoint(f"{path}: contains a {type(raw).__name__}; expected a JSON object.")
    return raw


_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AssertionError,
)
"""Errors of torch.load for files of other formats, depending on their first bytes."""


def _read_tensors_only(path: Path) -> State:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: file not found; the original layout requires it.") from None
    except _UNPICKLING_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadCheckpoint(f"{path}: rejected, it is not a pickle of tensors only ({reason}).") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise BadCheckpoint(f"{path}: not a dictionary of tensors.")
    return state


def load_state(network: nn.Module, state: State, source: str | Path) -> None:
    """Load the tensors into a network.

    Raises:
        BadCheckpoint: names or shapes do not match the network's.
    """
    expected = network.state_dict()
    # Checkpoints may omit the codebooks' EMA statistics; reconstruct them from the codes.
    for name, tensor in expected.items():
        leaf = name.rpartition(".")[2]
        if name in state or leaf not in ("inited", "cluster_size", "embed_avg"):
            continue
        embed = state.get(name.removesuffix(leaf) + "embed")
        if embed is not None:
            state[name] = embed.clone() if leaf == "embed_avg" else torch.ones_like(tensor)
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        raise BadCheckpoint(
            f"{source}: the tensors do not match the codec's configuration: {len(missing)} missing"
            f"{_first_of(missing)}, {len(extra)} unknown{_first_of(extra)}."
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise BadCheckpoint(
                f"{source}: {name} has shape {tuple(tensor.shape)}; "
                f"expected {tuple(expected[name].shape)} by the configuration."
            )
    network.load_state_dict(state)


def _first_of(names: list[str]) -> str:
    return f" (the first is {names[0]})" if names else ""


def write_checkpoint(folder: Path, config: HiggsAudioCodecConfig, state: Mapping[str, Tensor], layout: Layout) -> None:
    """Write a checkpoint in a layout of the reference implementation or transformers.

    Args:
        state: tensors with internal names, weight norm folded.
    """
    raw = configs.to_original(config) if layout == "original" else configs.to_transformers(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    state = _unfold_position_conv(state)
    if layout == "transformers":
        safetensors.torch.save_file(state, folder / SINGLE_FILE, metadata={"format": "pt"})
        return
    semantic = json.dumps(config.semantic.to_dict(), indent=2)
    (folder / _SEMANTIC_CONFIG).write_text(semantic + "\n", encoding="utf-8")
    torch.save(_to_original(state, len(config.ratios)), folder / _ORIGINAL_WEIGHTS)


def _unfold_position_conv(state: State) -> State:
    weight = state.pop(_POSITION_CONV + "weight", None)
    if weight is None:
        return state
    magnitude, direction = unfold_weight_norm(weight, axis=2)
    names = [_POSITION_CONV + f"parametrizations.weight.original{index}" for index in (0, 1)]
    return state | dict(zip(names, (magnitude, direction), strict=True))


def _to_original(state: State, num_blocks: int) -> State:
    renamed: State = {}
    for internal, tensor in state.items():
        name = original_name(internal, num_blocks)
        if internal.startswith("acoustic_") and name.endswith(".weight"):
            renamed[name + "_g"], renamed[name + "_v"] = unfold_weight_norm(tensor, axis=0)
        else:
            renamed[name] = tensor
    return renamed
