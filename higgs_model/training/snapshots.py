"""States that a training can go on from: weights as a checkpoint that anything can load, beside them the optimizer's.

    OUT/checkpoints/step-00001000/   config.json, model.safetensors, tokenizer · optimizer.safetensors, training.json

A state is whole or absent: it gets its name when all of it is written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from higgs_model.errors import BadCheckpoint
from higgs_model.model.model import HiggsAudioModel
from higgs_model.training.loading import Trainee
from higgs_model.training.workers import Workers

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_STATE, _OPTIMIZER = "training.json", "optimizer.safetensors"
_WINDOW = "window"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        step: steps that are done.
        settings: under which, as plain values.
    """

    step: int
    settings: dict[str, Any]


class Snapshots:
    """The states of one training.

    Args:
        keep: the newest so many stay.
    """

    def __init__(self, output: Path, keep: int) -> None:
        self._folder, self._keep = output / "checkpoints", keep

    def latest(self) -> Path | None:
        """The newest state, if there is any."""
        found = sorted(self._folder.glob("step-*"))
        return found[-1] if found else None

    def save(
        self,
        progress: Progress,
        model: HiggsAudioModel,
        optimizer: torch.optim.Optimizer,
        window: Tensor,
        trainee: Trainee,
        workers: Workers,
    ) -> None:
        """Write a state; all workers must call it."""
        weights = whole_weights(model)
        moments: dict[str, dict[str, Tensor]] = _whole_state(model, optimizer)["state"]
        if workers.is_first:
            path = self._folder / f"step-{progress.step:08d}"
            draft = path.with_name(f".{path.name}.part")
            shutil.rmtree(draft, ignore_errors=True)
            model.save_pretrained(draft, state=weights)
            trainee.save_tokenizer(draft)
            # Learning rate and the like follow from the settings; what torch remembers of them is not kept.
            tensors = {f"{name}/{key}": value for name, kept in moments.items() for key, value in kept.items()}
            save_file({**tensors, _WINDOW: window.cpu()}, draft / _OPTIMIZER)
            (draft / _STATE).write_text(json.dumps(dataclasses.asdict(progress), indent=2) + "\n")
            shutil.rmtree(path, ignore_errors=True)
            os.replace(draft, path)
            for old in sorted(self._folder.glob("step-*"))[: -self._keep]:
                shutil.rmtree(old)
        workers.wait()


def whole_weights(model: HiggsAudioModel) -> dict[str, Tensor]:
    """The model's tensors on the first worker's CPU, wherever their parts are; all workers must call it."""
    weights: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
    return weights


def _whole_state(model: HiggsAudioModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by the names of what it is of, and its settings."""
    return dict(get_optimizer_state_dict(model, optimizer, options=_WHOLE))


def read_progress(state: Path) -> Progress:
    """How far a state is.

    Raises:
        BadCheckpoint: it cannot be read.
    """
    try:
        return Progress(**json.loads((state / _STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise BadCheckpoint(f"{state / _STATE} cannot be read: {error}") from error


def restore_optimizer(state: Path, model: HiggsAudioModel, optimizer: torch.optim.Optimizer) -> Tensor:
    """Give the optimizer its state back, and the sums since the last line of the log."""
    tensors: dict[str, Any] = load_file(state / _OPTIMIZER)
    window: Tensor = tensors.pop(_WINDOW)
    current = _whole_state(model, optimizer)
    wanted = {name: {key: f"{name}/{key}" for key in kept} for name, kept in current["state"].items()}
    if {stored for keys in wanted.values() for stored in keys.values()} != tensors.keys():
        raise BadCheckpoint(f"{state / _OPTIMIZER} is of other weights than those that are trained now")
    kept = {name: {key: tensors[stored] for key, stored in keys.items()} for name, keys in wanted.items()}
    set_optimizer_state_dict(model, optimizer, {**current, "state": kept}, options=_WHOLE)
    return window
