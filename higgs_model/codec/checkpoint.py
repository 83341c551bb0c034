"""The codec on disk, in both layouts.

* Original: `config.json` and `model.pth` (the tensors of everything, the semantic model included, with weight-normed
  convolutions as pairs); the semantic model's configuration, where it is not HuBERT-base, in
  `semantic_config.json`.
* transformers: `config.json` (`model_type: higgs_audio_v2_tokenizer`) and `model.safetensors`, or shards of
  it.

In: a located folder. Out: the configuration and a state dictionary under our names, checked tensor by
tensor by the caller's network. A `model.pth` is read as tensors only; a pickle that holds anything else is
refused. Nothing is fetched but the named repository itself. Every fault is a `BadCheckpoint` naming the file.
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

from higgs_model.checkpoint import SINGLE_FILE, Location, TensorFiles
from higgs_model.codec import config as configs
from higgs_model.codec.config import HiggsAudioCodecConfig
from higgs_model.codec.names import State, fold_weight_norm, original_name, our_name, unfold_weight_norm
from higgs_model.errors import BadCheckpoint

Layout = Literal["transformers", "original"]

_CONFIG, _SEMANTIC_CONFIG, _ORIGINAL_WEIGHTS = "config.json", "semantic_config.json", "model.pth"
_PORT_TYPE = "higgs_audio_v2_tokenizer"
_UNUSED = "semantic_model.masked_spec_embed"
"""Replaces masked features while a speech model is trained; ours never is."""
_POSITIONS = "semantic_model.encoder.pos_conv_embed.conv."
"""The speech model's one weight-normed convolution; its magnitudes lie along the taps (axis 2)."""


def read_checkpoint(location: Location) -> tuple[HiggsAudioCodecConfig, State]:
    """Read a checkpoint of either layout.

    Returns:
        The configuration, and the tensors under our names on the CPU, weight norm folded.
    """
    folder = location.directory
    raw = _read_json(folder / _CONFIG)
    if raw.get("model_type") == _PORT_TYPE:
        files = TensorFiles(folder)
        state = files.read(files.shapes, "cpu", None)
        count = len({name.split(".")[2] for name in state if name.startswith("quantizer.quantizers.")})
        return configs.from_transformers(raw, count), _clean(state)
    return _read_original(folder, raw)


def _read_original(folder: Path, raw: Mapping[str, Any]) -> tuple[HiggsAudioCodecConfig, State]:
    weights = folder / _ORIGINAL_WEIGHTS
    state = _read_tensors_only(weights)
    for name in ("encoder.block.0.bias", "decoder_2.model.0.bias", "encoder_semantic.conv.conv.weight"):
        if name not in state:
            raise BadCheckpoint(f"{weights}: there is no tensor {name!r}; this is not a Higgs Audio codec.")
    path = folder / _SEMANTIC_CONFIG
    semantic = configs.semantic_config(_read_json(path)) if path.exists() else None
    config = configs.from_original(raw, semantic, {name: tuple(tensor.shape) for name, tensor in state.items()})
    return config, _clean({our_name(name, len(config.ratios)): tensor for name, tensor in state.items()})


def _clean(state: Mapping[str, Tensor]) -> State:
    folded = fold_weight_norm(state)
    folded.pop(_UNUSED, None)
    return folded


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: there is no such file; a codec checkpoint has one.") from None
    except ValueError as error:
        raise BadCheckpoint(f"{path}: not JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise BadCheckpoint(f"{path}: holds a {type(raw).__name__}; wanted an object.")
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
"""What torch.load raises for a file that is something else, depending on its first bytes."""


def _read_tensors_only(path: Path) -> State:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: there is no such file; the original layout has one.") from None
    except _UNPICKLING_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadCheckpoint(f"{path}: refused, it is not a file of tensors alone ({reason}).") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise BadCheckpoint(f"{path}: holds something else than a dictionary of tensors.")
    return state


def fill(network: nn.Module, state: State, source: str | Path) -> None:
    """Put the tensors into the network; every one must fit and none may be missing."""
    wanted = network.state_dict()
    # A codebook's training statistics may have been left out: it is then a trained one, at rest.
    for name, tensor in wanted.items():
        leaf = name.rpartition(".")[2]
        if name in state or leaf not in ("inited", "cluster_size", "embed_avg"):
            continue
        embed = state.get(name.removesuffix(leaf) + "embed")
        if embed is not None:
            state[name] = embed.clone() if leaf == "embed_avg" else torch.ones_like(tensor)
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        raise BadCheckpoint(
            f"{source}: the tensors are not those of the configured codec: {len(missing)} missing"
            f"{_some(missing)}, {len(extra)} unknown{_some(extra)}."
        )
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise BadCheckpoint(
                f"{source}: {name} has the shape {tuple(tensor.shape)}; "
                f"the configuration asks for {tuple(wanted[name].shape)}."
            )
    network.load_state_dict(state)


def _some(names: list[str]) -> str:
    return f" (the first is {names[0]})" if names else ""


def write_checkpoint(folder: Path, config: HiggsAudioCodecConfig, state: Mapping[str, Tensor], layout: Layout) -> None:
    """Write a checkpoint that the original, transformers' port and `read_checkpoint` can load.

    Args:
        state: under our names, plain weights.
    """
    raw = configs.to_original(config) if layout == "original" else configs.to_transformers(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    state = _unfold_positions(state)
    if layout == "transformers":
        safetensors.torch.save_file(state, folder / SINGLE_FILE, metadata={"format": "pt"})
        return
    semantic = json.dumps(config.semantic.to_dict(), indent=2)
    (folder / _SEMANTIC_CONFIG).write_text(semantic + "\n", encoding="utf-8")
    torch.save(_to_original(state, len(config.ratios)), folder / _ORIGINAL_WEIGHTS)


def _unfold_positions(state: State) -> State:
    weight = state.pop(_POSITIONS + "weight", None)
    if weight is None:
        return state
    magnitude, direction = unfold_weight_norm(weight, axis=2)
    names = [_POSITIONS + f"parametrizations.weight.original{place}" for place in (0, 1)]
    return state | dict(zip(names, (magnitude, direction), strict=True))


def _to_original(state: State, num_blocks: int) -> State:
    renamed: State = {}
    for ours, tensor in state.items():
        name = original_name(ours, num_blocks)
        if ours.startswith("acoustic_") and name.endswith(".weight"):
            renamed[name + "_g"], renamed[name + "_v"] = unfold_weight_norm(tensor, axis=0)
        else:
            renamed[name] = tensor
    return renamed
