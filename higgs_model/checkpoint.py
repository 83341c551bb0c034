"""Checkpoint files: resolving, validating and loading them into a module.

A checkpoint is a local folder or a Hub id. The headers of its safetensors files are compared with the module's state
dict before any tensor is read. Then tensors are read one at a time, straight to their device and dtype, so that the
host never holds a second copy. Nothing here depends on what the tensors mean: callers translate the layouts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from higgs_model.errors import BadCheckpoint

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The floating-point types of safetensors files; weights have no other type."""
_MAX_LISTED_NAMES = 8
"""Per error message."""


@dataclasses.dataclass(frozen=True)
class CheckpointLocation:
    """A checkpoint's folder, and the Hub commit of the snapshot (None for a local folder)."""

    directory: Path
    revision: str | None = None


def resolve_checkpoint(
    path_or_hub_id: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> CheckpointLocation:
    """Return the folder of a checkpoint, after downloading what the Hub cache lacks.

    Args:
        path_or_hub_id: a local folder, or a repository of the Hugging Face Hub.
        revision: branch, tag or commit of a Hub id; a pinned commit protects against rewritten repositories.
        local_files_only: use only the cache, as HF_HUB_OFFLINE=1 does for the whole process.

    Raises:
        BadCheckpoint: the folder does not exist, or the Hub id does not exist or is unreachable.
    """
    if not isinstance(path_or_hub_id, str | Path) or not str(path_or_hub_id):
        raise BadCheckpoint(f"{path_or_hub_id!r} is neither a folder nor a Hub id")
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return CheckpointLocation(path)
    name = str(path_or_hub_id)
    if path.is_file() or name.startswith(("/", "./", "../", "~")):
        raise BadCheckpoint(f"{name} is not a folder: a checkpoint is a folder with config.json and its weights")
    try:
        snapshot = snapshot_download(
            name,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=["*.json", "*.safetensors", "*.pth"],
        )
    except HFValidationError as error:
        raise BadCheckpoint(f"{name!r} is neither a folder nor a Hub id") from error
    except LocalEntryNotFoundError as error:
        raise BadCheckpoint(
            f"{name!r} is not a local folder, not in the local Hub cache, and the Hub is unreachable"
        ) from error
    except HfHubHTTPError as error:
        raise BadCheckpoint(
            f"the Hub denies access to {name!r} at revision {revision or 'main'}, or it does not exist: {error}"
        ) from error
    return CheckpointLocation(Path(snapshot), revision=Path(snapshot).name)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer stored next to a checkpoint's weights.

    Raises:
        BadCheckpoint: it is missing or unreadable.
    """
    try:
        # An explicit configuration keeps transformers from reading config.json, whose model type it does not support.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, config=PreTrainedConfig(), local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{directory} has no readable tokenizer: {error}") from error
    return tokenizer


class SafetensorsFiles:
    """The tensors in a folder's safetensors files. The constructor reads headers only.

    Attributes:
        shapes, dtypes: shape and dtype of every tensor, by its stored name.

    Raises:
        BadCheckpoint: a file is missing or truncated, or two files hold the same tensor.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Path] = {}
        for path in _weight_files(directory):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  (not a dict)
                        if name in self._files:
                            raise BadCheckpoint(
                                f"tensor {name} is in both {self._files[name].name} and {path.name} of {directory}"
                            )
                        header = file.get_slice(name)
                        self.shapes[name] = tuple(header.get_shape())
                        self.dtypes[name] = _DTYPES.get(header.get_dtype(), torch.int64)
                        self._files[name] = path
            except (SafetensorError, OSError) as error:
                raise BadCheckpoint(f"{path} cannot be read as safetensors: {error}") from error

    def read(self, names: Iterable[str], device: torch.device | str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Read tensors file by file, and convert floating-point ones to `dtype`; None keeps the stored dtype."""
        names_by_file: dict[Path, list[str]] = {}
        for name in names:
            names_by_file.setdefault(self._files[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, file_names in names_by_file.items():
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file_names:
                    tensor = file.get_tensor(name)
                    tensors[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        return tensors

    def weight_dtype(self) -> torch.dtype:
        """Return the dtype of the first floating-point tensor; float32 if there is none."""
        return next((dtype for dtype in self.dtypes.values() if dtype.is_floating_point), torch.float32)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadCheckpoint(f"{index} is not an index of safetensors files: {error!r}") from error
    else:
        names = [SINGLE_FILE]
    paths = [directory / name for name in names]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise BadCheckpoint(f"{directory} lacks the weight files {_format_names(missing)}")
    return paths


def load_tensors(
    module: nn.Module,
    files: SafetensorsFiles,
    stored_names: Mapping[str, list[str]],
    *,
    ignored: Iterable[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Load tensors into a module that was built on the meta device.

    Args:
        module: the module to fill.
        files: the checkpoint's tensors.
        stored_names: for each tensor of the module, the stored tensors to concatenate along dimension 0.
        ignored: stored names that may be present and are not loaded.
        device: where the tensors go.
        dtype: of floating-point tensors; None keeps the stored dtype.

    Raises:
        BadCheckpoint: tensors are missing, unexpected or of a wrong shape. They are listed, and nothing is read.
    """
    state: dict[str, Tensor] = module.state_dict()
    expected_shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _check_tensors(files, expected_shapes, stored_names, set(ignored))
    stored = files.read((part for name in expected_shapes for part in stored_names[name]), device, dtype)
    for name in expected_shapes:
        # Parts are released as soon as they are concatenated, so that pairs do not double the peak memory.
        parts = [stored.pop(part) for part in stored_names[name]]
        state[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    module.load_state_dict(state, strict=True, assign=True)


def _check_tensors(
    files: SafetensorsFiles,
    expected_shapes: dict[str, tuple[int, ...]],
    stored_names: Mapping[str, list[str]],
    ignored: set[str],
) -> None:
    used = {part for name in expected_shapes for part in stored_names[name]}
    missing = sorted(used - files.shapes.keys())
    unexpected = sorted(files.shapes.keys() - used - ignored)
    mismatched = []
    for name, shape in expected_shapes.items():
        found = [files.shapes[part] for part in stored_names[name] if part in files.shapes]
        if len(found) == len(stored_names[name]) and _concatenated_shape(found) != shape:
            mismatched.append(
                f"{' + '.join(stored_names[name])} is {_concatenated_shape(found) or found}, expected {shape}"
            )
    problems = [
        f"{problem}: {_format_names(names)}"
        for problem, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", mismatched),
        )
        if names
    ]
    if problems:
        raise BadCheckpoint(f"the weights in {files.directory} do not match its configuration: {'; '.join(problems)}")


def _concatenated_shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape after concatenation along dimension 0; None if the shapes are incompatible."""
    if len(shapes) == 1:
        return shapes[0]
    if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
        return None
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _format_names(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED_NAMES} more" if len(names) > _MAX_LISTED_NAMES else ""
    return ", ".join(names[:_MAX_LISTED_NAMES]) + more


def save_tensors(state: dict[str, Tensor], directory: Path, max_shard_size: int | str = "5GB") -> None:
    """Write tensors as safetensors, sharded into several files with an index above `max_shard_size`."""
    save_torch_state_dict(state, directory, max_shard_size=max_shard_size)
