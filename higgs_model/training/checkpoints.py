"""Checkpoints to resume training from: a regular model checkpoint, plus the optimizer's state.

    OUT/checkpoints/step-00001000/   config.json, model.safetensors, tokenizer · optimizer.safetensors, training.json

A checkpoint is written atomically: the folder is renamed when it is complete. Sharded tensors are gathered one by one,
so that any number of workers can resume from it.
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
from higgs_model.training.model_source import ModelSource
from higgs_model.training.workers import WorkerGroup

_PROGRESS_FILE, _OPTIMIZER_FILE = "training.json", "optimizer.safetensors"
_METRIC_SUMS = "window"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a training run.

    Attributes:
        step: number of completed steps.
        batches: number of batches consumed by all workers.
        settings: the settings as plain values.
        data: identifier of the training data.
    """

    step: int
    batches: int
    settings: dict[str, Any]
    data: str = ""


class CheckpointManager:
    """Checkpoints of one training run.

    Args:
        output: output folder of the run.
        keep: number of most recent checkpoints to keep.
    """

    def __init__(self, output: Path, keep: int) -> None:
        self._folder, self._keep = output / "checkpoints", keep

    def latest(self) -> Path | None:
        """Return the most recent checkpoint, or None."""
        checkpoints = sorted(self._folder.glob("step-*"))
        return checkpoints[-1] if checkpoints else None

    def save(
        self,
        progress: Progress,
        model: HiggsAudioModel,
        optimizer: torch.optim.Optimizer,
        metric_sums: Tensor,
        source: ModelSource,
        workers: WorkerGroup,
    ) -> None:
        """Write a checkpoint unless it exists; all workers must call it."""
        weights = gather_weights(model, workers)
        moments = {
            f"{name}/{key}": _gather(value, workers)
            for name, parameter in _trainable_parameters(model)
            for key, value in optimizer.state[parameter].items()
        }
        path = self._folder / f"step-{progress.step:08d}"
        if workers.is_main_process and not path.is_dir():
            draft = path.with_name(f".{path.name}.part")
            shutil.rmtree(draft, ignore_errors=True)
            model.save_pretrained(draft, state=weights)
            source.save_tokenizer(draft)
            # Hyperparameters such as the learning rate follow from the settings and are not stored.
            save_file({**moments, _METRIC_SUMS: metric_sums.cpu()}, draft / _OPTIMIZER_FILE)
            (draft / _PROGRESS_FILE).write_text(json.dumps(dataclasses.asdict(progress), indent=2) + "\n")
            os.replace(draft, path)
            for outdated in sorted(self._folder.glob("step-*"))[: -self._keep]:
                shutil.rmtree(outdated)
        workers.barrier()


def gather_weights(model: HiggsAudioModel, workers: WorkerGroup) -> dict[str, Tensor]:
    """Gather the model's tensors on the main process's CPU; all workers must call it."""
    return {name: _gather(tensor, workers) for name, tensor in model.state_dict().items()}


def read_progress(checkpoint: Path) -> Progress:
    """Read the progress of a checkpoint.

    Raises:
        BadCheckpoint: it cannot be read.
    """
    try:
        return Progress(**json.loads((checkpoint / _PROGRESS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise BadCheckpoint(f"{checkpoint / _PROGRESS_FILE} cannot be read: {error}") from error


def restore_optimizer(checkpoint: Path, model: HiggsAudioModel, optimizer: torch.optim.Optimizer) -> Tensor:
    """Restore the optimizer's state, and return the metric sums since the last log entry.

    Raises:
        BadCheckpoint: the checkpoint's trainable parameters differ from the model's.
    """
    tensors = load_file(checkpoint / _OPTIMIZER_FILE)
    metric_sums = tensors.pop(_METRIC_SUMS)
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        moments.setdefault(parameter_name, {})[key] = tensor
    trainable = dict(_trainable_parameters(model))
    if moments.keys() != trainable.keys():
        raise BadCheckpoint(f"{checkpoint / _OPTIMIZER_FILE}: its parameters are not the model's trainable parameters")
    for name, parameter in trainable.items():
        optimizer.state[parameter] = {key: _shard_like(value, parameter) for key, value in moments[name].items()}
    return metric_sums


def _trainable_parameters(model: HiggsAudioModel) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _gather(tensor: Tensor, workers: WorkerGroup) -> Tensor:
    """Return the full tensor on the main process's CPU, and an empty one on other workers."""
    # Cloned, because an unevenly sharded tensor is gathered into a view of a padded one, which safetensors rejects.
    full = tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu() if workers.is_main_process else torch.empty(0)


def _shard_like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Move a value to the parameter's device, and shard it like the parameter."""
    if isinstance(parameter, DTensor) and value.dim():
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)
