"""The training loop in Ray Train's workers: one a GPU, or one a share of this machine's cores.

Whatever ends a worker, Ray Train starts all of them again, and they go on from the last state in the output, which all
must see.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from higgs_model.errors import BadInput, HiggsError
from higgs_model.training.metrics_log import MetricValue
from higgs_model.training.settings import TrainingSettings
from higgs_model.training.trainer import Diverged
from higgs_model.training.workers import WorkerGroup
from jobs.runtime.cli import print_status
from jobs.runtime.ray_cluster import connect
from jobs.train.worker import WorkersFailed, told_line, train_here

_RESTARTS = 3
_REFUSED = "refused.json"
_LOOK_EVERY_S = 2.0


def train_on_cluster(settings: TrainingSettings, folders: Sequence[Path], workers: int) -> bool:
    """Train in so many workers; gives whether it came to its end.

    Raises:
        BadInput: the cluster has GPUs, but too few; or what the workers found wrong with settings or data.
        Diverged: the loss is no number any more.
        WorkersFailed: whatever it was, it came again and again.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    if not ray.is_initialized():
        connect()
    resources = ray.cluster_resources()
    use_gpu = settings.device != "cpu" and resources.get("GPU", 0) > 0
    if use_gpu and resources["GPU"] < workers:
        raise BadInput(f"--workers {workers} is more than the {resources['GPU']:.0f} GPUs of the cluster")
    cpus = 1 if resources.get("CPU", 1) >= workers else resources["CPU"] / workers
    trainer = TorchTrainer(
        _loop,
        train_loop_config={"settings": settings.model_dump(mode="json"), "folders": [str(one) for one in folders]},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus}),
        run_config=RunConfig(
            name="train",
            storage_path=str(Path(settings.output) / "ray"),
            failure_config=FailureConfig(max_failures=_RESTARTS),
        ),
    )
    refused = Path(settings.output) / _REFUSED
    refused.unlink(missing_ok=True)
    with _followed(Path(settings.output) / "log.jsonl"):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            if not refused.exists():
                last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                raise WorkersFailed(last[:300]) from error
    if refused.exists():
        reason = json.loads(refused.read_text(encoding="utf-8"))
        refused.unlink()
        raise (Diverged if reason["diverged"] else BadInput)(reason["message"])
    return True


@contextlib.contextmanager
def _followed(log: Path) -> Iterator[None]:
    """Say here what the first worker writes into the log there."""
    ended = threading.Event()

    def follow() -> None:
        place = log.stat().st_size if log.exists() else 0
        while not ended.wait(_LOOK_EVERY_S):
            if log.exists():
                with log.open("rb") as file:
                    # A training that is gone on with takes lines out first.
                    place = file.seek(min(place, log.stat().st_size))
                    *lines, _ = file.read().split(b"\n")
                place += sum(len(line) + 1 for line in lines)
                for line in lines:
                    told = json.loads(line)
                    print_status(told_line(told.pop("step"), told))

    watcher = threading.Thread(target=follow, name="log", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _loop(told: Mapping[str, Any]) -> None:
    """What each worker runs."""
    import ray.train
    from ray.train.torch import get_device

    settings = TrainingSettings.model_validate(told["settings"])
    # Which of a machine's GPUs is Ray's to say.
    device = "cpu" if settings.device == "cpu" else str(get_device())
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    else:
        # Workers that each took all cores would wait for each other.
        torch.set_num_threads(max((os.cpu_count() or 1) // ray.train.get_context().get_local_world_size(), 1))

    def report(step: int, values: Mapping[str, MetricValue]) -> None:
        ray.train.report({"step": step, **values})

    try:
        train_here(settings, [Path(one) for one in told["folders"]], WorkerGroup.current(device), report)
    except HiggsError as error:
        # It would come again after every restart; the driver reads why.
        reason = {"diverged": isinstance(error, Diverged), "message": str(error)}
        (Path(settings.output) / _REFUSED).write_text(json.dumps(reason), encoding="utf-8")
