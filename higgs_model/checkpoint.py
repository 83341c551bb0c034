"""Checkpoint files: where they are, what they hold, and how tensors get from them into a module.

A checkpoint is a local folder or a hub id. Its safetensors files are first compared, by their headers alone, with what
the module asks for; only then is anything read, one tensor at a time, straight to its device and dtype, so that the
host never holds a second copy. Nothing here knows what the tensors mean; layouts are translated by whoever calls.
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
"""How safetensors files call the types that weights have; all others are none of weights."""
_SHOWN = 8
"""Names listed in one message at most."""


@dataclasses.dataclass(frozen=True)
class Location:
    """A checkpoint's folder, and the hub commit that it is a snapshot of (None for a folder of the user's)."""

    directory: Path
    revision: str | None = None


def locate(path_or_hub_id: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Location:
    """Find a checkpoint, downloading from the hub what is not yet in its cache.

    Args:
        revision: branch, tag or commit of a hub id; pin a commit to be safe from rewritten repositories.
        local_files_only: use the cache alone, as the environment's HF_HUB_OFFLINE does for all.

    Raises:
        BadCheckpoint: there is no such folder, and no such hub id that can be reached.
    """
    if not isinstance(path_or_hub_id, str | Path) or not str(path_or_hub_id):
        raise BadCheckpoint(f"{path_or_hub_id!r} is neither a folder nor a hub id")
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return Location(path)
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
        raise BadCheckpoint(f"{name!r} is neither a folder nor a hub id") from error
    except LocalEntryNotFoundError as error:
        raise BadCheckpoint(
            f"{name!r} is not a folder here, not in the local hub cache, and the hub cannot be reached"
        ) from error
    except HfHubHTTPError as error:
        raise BadCheckpoint(f"the hub has no {name!r} at revision {revision or 'main'} for you: {error}") from error
    return Location(Path(snapshot), revision=Path(snapshot).name)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint's weights.

    Raises:
        BadCheckpoint: there is none, or it cannot be read.
    """
    try:
        # With a configuration at hand transformers does not look at the network's, whose type it does not know.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, config=PreTrainedConfig(), local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{directory} has no tokenizer that can be read: {error}") from error
    return tokenizer


class TensorFiles:
    """The tensors in a folder's safetensors files. Opening reads headers only.

    Attributes:
        shapes, dtypes: of every tensor by its stored name.

    Raises:
        BadCheckpoint: a file is missing, cut short, or names what another already has.
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
        """Read tensors, file by file; floating-point ones as `dtype`, None leaving them as they are stored."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, in_file in by_file.items():
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in in_file:
                    tensor = file.get_tensor(name)
                    tensors[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        return tensors

    def dtype(self) -> torch.dtype:
        """The dtype of the first stored tensor that is floating-point; float32 when there is none."""
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
        raise BadCheckpoint(f"{directory} lacks {_listed(missing)}, where its weights should be")
    return paths


def load_tensors(
    module: nn.Module,
    files: TensorFiles,
    stored_names: Mapping[str, list[str]],
    *,
    ignored: Iterable[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Fill a module that was built on the meta device.

    Args:
        stored_names: for each of the module's tensors the stored ones that make it up, joined along dimension 0.
        ignored: stored names that may be there and are not wanted.

    Raises:
        BadCheckpoint: tensors are missing, unexpected, or of another shape; they are named, and nothing was read.
    """
    state: dict[str, Tensor] = module.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _compare(files, wanted, stored_names, set(ignored))
    parts = files.read((part for name in wanted for part in stored_names[name]), device, dtype)
    for name in wanted:
        # Joined parts are let go one by one, so that pairs do not double the peak.
        pieces = [parts.pop(part) for part in stored_names[name]]
        state[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    module.load_state_dict(state, strict=True, assign=True)


def _compare(
    files: TensorFiles,
    wanted: dict[str, tuple[int, ...]],
    stored_names: Mapping[str, list[str]],
    ignored: set[str],
) -> None:
    used = {part for name in wanted for part in stored_names[name]}
    missing = sorted(used - files.shapes.keys())
    unexpected = sorted(files.shapes.keys() - used - ignored)
    misshaped = []
    for name, shape in wanted.items():
        found = [files.shapes[part] for part in stored_names[name] if part in files.shapes]
        if len(found) == len(stored_names[name]) and _joined(found) != shape:
            misshaped.append(f"{' + '.join(stored_names[name])} is {_joined(found) or found}, wanted {shape}")
    faults = [
        f"{what} {_listed(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape:", misshaped),
        )
        if names
    ]
    if faults:
        raise BadCheckpoint(f"the weights in {files.directory} are not those of its configuration: {'; '.join(faults)}")


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Shape after joining along dimension 0; None when these cannot be joined."""
    if len(shapes) == 1:
        return shapes[0]
    if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
        return None
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def save_tensors(state: dict[str, Tensor], directory: Path, max_shard_size: int | str = "5GB") -> None:
    """Write tensors as safetensors, in several files with an index where one would be too large."""
    save_torch_state_dict(state, directory, max_shard_size=max_shard_size)
