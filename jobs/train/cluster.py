"""The training loop in Ray Train workers, one per GPU or per share of the CPU cores.

If a worker dies, Ray Train restarts all of them, and they resume from the last checkpoint in the output folder, which
every worker must be able to read.
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
from jobs.train.worker import WorkersFailed, format_metrics, train_in_process

_MAX_RESTARTS = 3
_FATAL_ERROR_FILE = "refused.json"
_POLL_INTERVAL_S = 2.0


def train_on_cluster(settings: TrainingSettings, folders: Sequence[Path], workers: int) -> bool:
    """Train in `workers` Ray Train workers.

    Returns:
        True; a training that does not finish raises.

    Raises:
        BadInput: the cluster has fewer GPUs than workers, or a worker rejected the settings or the data.
        Diverged: the loss is not finite.
        WorkersFailed: workers kept failing until the restarts were used up.
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
        _train_loop,
        train_loop_config={"settings": settings.model_dump(mode="json"), "folders": [str(path) for path in folders]},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus}),
        run_config=RunConfig(
            name="train",
            storage_path=str(Path(settings.output) / "ray"),
            failure_config=FailureConfig(max_failures=_MAX_RESTARTS),
        ),
    )
    fatal_error = Path(settings.output) / _FATAL_ERROR_FILE
    fatal_error.unlink(missing_ok=True)
    with _print_log(Path(settings.output) / "log.jsonl"):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            if not fatal_error.exists():
                last_line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                raise WorkersFailed(last_line[:300]) from error
    if fatal_error.exists():
        details = json.loads(fatal_error.read_text(encoding="utf-8"))
        fatal_error.unlink()
        raise (Diverged if details["diverged"] else BadInput)(details["message"])
    return True


@contextlib.contextmanager
def _print_log(log: Path) -> Iterator[None]:
    """Print on the driver what the first worker appends to the metrics log."""
    stop = threading.Event()

    def follow() -> None:
        offset = log.stat().st_size if log.exists() else 0
        while not stop.wait(_POLL_INTERVAL_S):
            if log.exists():
                with log.open("rb") as file:
                    # A resumed training first removes the lines after its checkpoint.
                    offset = file.seek(min(offset, log.stat().st_size))
                    *lines, _ = file.read().split(b"\n")
                offset += sum(len(line) + 1 for line in lines)
                for line in lines:
                    metrics = json.loads(line)
                    print_status(format_metrics(metrics.pop("step"), metrics))

    follower = threading.Thread(target=follow, name="log", daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()


def _train_loop(config: Mapping[str, Any]) -> None:
    """Run the training loop in one Ray Train worker."""
    import ray.train
    from ray.train.torch import get_device

    settings = TrainingSettings.model_validate(config["settings"])
    # Ray assigns the node's GPUs to workers.
    device = "cpu" if settings.device == "cpu" else str(get_device())
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    else:
        # Workers that each used all cores would slow each other down.
        torch.set_num_threads(max((os.cpu_count() or 1) // ray.train.get_context().get_local_world_size(), 1))

    def report(step: int, values: Mapping[str, MetricValue]) -> None:
        ray.train.report({"step": step, **values})

    try:
        train_in_process(settings, [Path(path) for path in config["folders"]], WorkerGroup.current(device), report)
    except HiggsError as error:
        # A restart would fail in the same way, so end without one and let the driver raise the error.
        details = {"diverged": isinstance(error, Diverged), "message": str(error)}
        (Path(settings.output) / _FATAL_ERROR_FILE).write_text(json.dumps(details), encoding="utf-8")
