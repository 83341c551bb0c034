"""States that a training can go on from: weights as a checkpoint that anything can load, beside them the optimizer's.

    OUT/checkpoints/step-00001000/   config.json, model.safetensors, tokenizer · optimizer.safetensors, training.json

A state is whole or absent: it gets its name when all of it is written. What is spread over several workers is put
together tensor by tensor, so that any number of workers can go on from it.
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
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from higgs_model.errors import BadCheckpoint
from higgs_model.model.model import HiggsAudioModel
from higgs_model.training.loading import Trainee
from higgs_model.training.workers import Workers

_STATE, _OPTIMIZER = "training.json", "optimizer.safetensors"
_WINDOW = "window"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        step: steps that are done.
        batches: and batches that were learnt in them, by all workers.
        settings: under which, as plain values.
        data: what identifies the samples that are learnt.
    """

    step: int
    batches: int
    settings: dict[str, Any]
    data: str = ""


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
        """Write a state, if it is not there; all workers must call it."""
        weights = whole_weights(model, workers)
        moments = {
            f"{name}/{key}": _whole(value, workers)
            for name, parameter in _trained(model)
            for key, value in optimizer.state[parameter].items()
        }
        path = self._folder / f"step-{progress.step:08d}"
        if workers.is_first and not path.is_dir():
            draft = path.with_name(f".{path.name}.part")
            shutil.rmtree(draft, ignore_errors=True)
            model.save_pretrained(draft, state=weights)
            trainee.save_tokenizer(draft)
            # Learning rate and the like follow from the settings; what torch remembers of them is not kept.
            save_file({**moments, _WINDOW: window.cpu()}, draft / _OPTIMIZER)
            (draft / _STATE).write_text(json.dumps(dataclasses.asdict(progress), indent=2) + "\n")
            os.replace(draft, path)
            for old in sorted(self._folder.glob("step-*"))[: -self._keep]:
                shutil.rmtree(old)
        workers.wait()


def whole_weights(model: HiggsAudioModel, workers: Workers) -> dict[str, Tensor]:
    """The model's tensors on the first worker's CPU, wherever their parts are; all workers must call it."""
    return {name: _whole(tensor, workers) for name, tensor in model.state_dict().items()}


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
    """Give the optimizer its state back, and the sums since the last line of the log.

    Raises:
        BadCheckpoint: it is the state of other weights.
    """
    tensors = load_file(state / _OPTIMIZER)
    window = tensors.pop(_WINDOW)
    kept: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition("/")
        kept.setdefault(owner, {})[key] = tensor
    trained = dict(_trained(model))
    if kept.keys() != trained.keys():
        raise BadCheckpoint(f"{state / _OPTIMIZER} is of other weights than those that are trained now")
    for name, parameter in trained.items():
        optimizer.state[parameter] = {key: _like(value, parameter) for key, value in kept[name].items()}
    return window


def _trained(model: HiggsAudioModel) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _whole(tensor: Tensor, workers: Workers) -> Tensor:
    """All of a tensor on the first worker's CPU; nothing of it on the others'."""
    # What was spread unevenly is a part of something longer, which files refuse.
    whole = tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu() if workers.is_first else torch.empty(0)


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """On the parameter's device, and spread as it is."""
    if isinstance(parameter, DTensor) and value.dim():
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)
