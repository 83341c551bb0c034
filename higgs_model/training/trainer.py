"""The training loop, run in a single process or in every worker.

    numbered batches ─▶ prefetched ─▶ step: forward and backward passes, update ─▶ log, validation, previews, checkpoint

A step depends on the settings, the data and its number only, so a killed run resumes with identical results. The host
waits for the device only when metrics are logged. Does not depend on a cluster or on tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from higgs_model.errors import BadConfig, BadInput, HiggsError
from higgs_model.synthesizer.loading import resolve_codec
from higgs_model.training import checkpoints
from higgs_model.training.batch import Batch
from higgs_model.training.batch_sampler import BatchSampler, PreparedDataset, SequenceSpec
from higgs_model.training.checkpoints import CheckpointManager, Progress
from higgs_model.training.collator import Collator
from higgs_model.training.metrics_log import MetricsLog, MetricValue
from higgs_model.training.model_source import ModelSource
from higgs_model.training.objective import Losses, Objective
from higgs_model.training.optimizer import build_optimizer, freeze_parameters, learning_rate
from higgs_model.training.settings import TrainingSettings
from higgs_model.training.workers import WorkerGroup

MetricsCallback = Callable[[int, Mapping[str, MetricValue]], None]
PreviewCallback = Callable[[int, torch.nn.Module], None]

_PREFETCHED_BATCHES = 4
_CHANGEABLE_SETTINGS = (
    *("checkpoints", "previews", "log_every", "validate_every", "device", "parallel", "gradient_checkpointing"),
    *("output", "codec"),
)
"""Settings that may change when a run is resumed."""


class Diverged(HiggsError):
    """The loss is not finite."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and validation data."""

    train: PreparedDataset
    validation: PreparedDataset | None = None


class Trainer:
    """One worker of a training run; resumes from the latest checkpoint in the output folder.

    Args:
        settings: settings of the run.
        model_source: the model to train.
        corpus: the data.
        workers: this worker's group; None: a single worker.
        report: receives the logged metrics of a step, in every worker.
        preview: synthesizes previews with the model after a step; for the main process only, the other workers wait in
            the next step.

    Raises:
        BadInput: there is no usable validation sample.
        BadConfig: the output folder has a run with different settings or data.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        model_source: ModelSource,
        corpus: Corpus,
        workers: WorkerGroup | None = None,
        *,
        report: MetricsCallback | None = None,
        preview: PreviewCallback | None = None,
    ) -> None:
        self.settings, self.model_source, self.corpus = settings, model_source, corpus
        self.workers = workers or WorkerGroup.current(settings.device)
        self._report, self._preview = report, preview
        self.output = Path(settings.output)
        if corpus.validation is not None and not len(corpus.validation):
            raise BadInput(f"the manifest {settings.data.validation!r} has no usable validation sample")
        self._checkpoints = CheckpointManager(self.output, settings.checkpoints.keep)
        checkpoint = self._checkpoints.latest()
        self.step, self._batches_done = self._resume_point(checkpoint)
        source = model_source if checkpoint is None else dataclasses.replace(model_source, checkpoint=checkpoint)
        self.model = source.build(settings.seed, self.workers.device).train()
        freeze_parameters(self.model, settings.freeze)
        if settings.gradient_checkpointing:
            # transformers 6 removes the older name; the newer one does not exist before 5.2x.
            enable = getattr(self.model, "activation_checkpointing_enable", None)
            (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        objective = Objective(self.model, settings.loss)
        self.objective = self.workers.wrap(objective, settings.parallel, settings.precision)
        self.optimizer = build_optimizer(self.model, settings.optimizer)
        num_codebooks = self.model.config.audio_num_codebooks
        self._metric_sums = torch.zeros(2 * (1 + num_codebooks), dtype=torch.float64, device=self.workers.device)
        if checkpoint is not None:
            metric_sums = checkpoints.restore_optimizer(checkpoint, self.model, self.optimizer)
            self._metric_sums.copy_(metric_sums / self.workers.world_size)
        self._collate = Collator(self.model.config)
        self._stopping = False

    def _resume_point(self, checkpoint: Path | None) -> tuple[int, int]:
        """Return the completed steps and batches of a checkpoint.

        Raises:
            BadConfig: its settings or data differ.
        """
        if checkpoint is None:
            return 0, 0
        progress = checkpoints.read_progress(checkpoint)
        current, saved = _result_settings(self.settings.model_dump(mode="json")), _result_settings(progress.settings)
        changed = [name for name, value in current.items() if saved.get(name) != value]
        if changed:
            raise BadConfig(
                f"{self.output} has a training run with different settings ({', '.join(changed)}); "
                "set another output or remove it"
            )
        if progress.data not in ("", self.corpus.train.name):
            raise BadConfig(
                f"{self.output} has a training run on different data: the manifest {self.settings.data.manifest!r}, "
                "its voices or the codec changed; set another output or remove it"
            )
        return progress.step, progress.batches

    # ------------------------------------------------------------------ the loop

    def run(self) -> bool:
        """Train to the last step; return False if stopped by a signal before, after saving a checkpoint.

        Raises:
            Diverged: the loss is not finite.
        """
        num_steps, is_main = self.settings.optimizer.steps, self.workers.is_main_process
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(contextlib.closing(MetricsLog(self.output, self.step))) if is_main else None
            stack.enter_context(self._stop_on_signal())
            prefetched = stack.enter_context(contextlib.closing(self._prefetch_batches()))
            started_s, positions = time.perf_counter(), 0
            while self.step < num_steps and not self._stopping:
                batches = list(itertools.islice(prefetched, self.settings.batch.accumulate))
                norm = self._run_step([batch for _, batch in batches])
                self.step += 1
                self._batches_done += len(batches) * self.workers.world_size
                positions += sum(batch.indices.num_valid for _, batch in batches)
                if self._is_due(self.settings.log_every):
                    metrics = self._collect_metrics(norm) | {"epoch": batches[-1][0]}
                    now_s = time.perf_counter()
                    speed = positions * self.workers.world_size / (now_s - started_s)
                    self._log(log, metrics | {"positions_per_s": round(speed, 1)})
                    started_s, positions = now_s, 0
                self._run_periodic_tasks(log)
        if not self._is_due(self.settings.checkpoints.every) or self.step == num_steps:
            self._save()
        if self.step == num_steps:
            self._export_model()
        return self.step == num_steps

    def _run_step(self, batches: Sequence[Batch]) -> Tensor:
        """Run an optimizer step on the accumulated batches; return the gradient norm, on the device."""
        settings, workers = self.settings, self.workers
        torch.manual_seed(hash((settings.seed, self.step, workers.rank)))
        counts = torch.tensor([[batch.num_labels, *batch.num_code_labels] for batch in batches], dtype=torch.float64)
        counts = counts.sum(dim=0)
        if workers.device.type == "cuda":
            counts = counts.pin_memory()
        counts = workers.all_reduce_sum(counts.to(workers.device, non_blocking=True))
        for index, batch in enumerate(batches):
            with workers.gradient_sync(self.objective, index == len(batches) - 1):
                losses = self._compute_losses(self.objective, batch, counts.float())
                # Gradients are averaged over the workers, but `counts` are already those of all workers.
                (losses.total * workers.world_size).backward()
            with torch.no_grad():
                self._metric_sums[: len(counts)] += torch.cat([losses.text.detach()[None], losses.codebooks.detach()])
        self._metric_sums[len(counts) :] += counts / workers.world_size
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.optimizer.clip_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings.optimizer, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _compute_losses(self, objective: torch.nn.Module, batch: Batch, counts: Tensor) -> Losses:
        """Return the losses of a batch."""
        device = self.workers.device
        mixed = self.settings.precision == "bfloat16" and self.settings.parallel != "fsdp"
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            losses: Losses = objective(batch.to(device), counts)
        return losses

    def _prefetch_batches(self) -> Generator[tuple[int, Batch]]:
        """Yield this worker's remaining batches with their epochs, collated ahead by a thread."""
        settings, workers = self.settings, self.workers
        sampler = BatchSampler(self.corpus.train, settings.data, settings.batch, settings.seed)
        batches = itertools.islice(sampler.iterate_from(self._batches_done), workers.rank, None, workers.world_size)
        on_gpu = workers.device.type == "cuda"
        ready: queue.Queue[tuple[int, Batch] | BaseException] = queue.Queue(_PREFETCHED_BATCHES)
        closed = threading.Event()

        def collate() -> None:
            try:
                for epoch, rows in batches:
                    batch = self._collate_batch(self.corpus.train, rows)
                    ready.put((epoch, batch.pin_memory() if on_gpu else batch))
                    if closed.is_set():
                        return
            except BaseException as error:  # noqa: BLE001  (re-raised in the consumer)
                ready.put(error)

        threading.Thread(target=collate, name="collator", daemon=True).start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            with contextlib.suppress(queue.Empty):
                while True:
                    ready.get_nowait()

    def _collate_batch(self, samples: PreparedDataset, rows: Sequence[Sequence[SequenceSpec]]) -> Batch:
        return self._collate([[samples.example(sequence) for sequence in row] for row in rows])

    # ------------------------------------------------------------------ periodic tasks

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0

    def _run_periodic_tasks(self, log: MetricsLog | None) -> None:
        """Run the validation, preview and checkpoint that are due after a step."""
        settings, is_last = self.settings, self.step == self.settings.optimizer.steps
        if self.corpus.validation is not None and (is_last or self._is_due(settings.validate_every)):
            self._log(log, self.validate())
        if settings.previews is not None and self._preview and (is_last or self._is_due(settings.previews.every)):
            self.model.eval()
            self._preview(self.step, self.model)
            self.model.train()
        if self._is_due(settings.checkpoints.every) and not is_last:
            self._save()

    def _collect_metrics(self, norm: Tensor) -> dict[str, MetricValue]:
        """Return the metrics of all workers since the last call; waits for the device."""
        metric_sums = self.workers.all_reduce_sum(self._metric_sums.clone())
        self._check_finite(metric_sums)
        metrics = self._loss_metrics(metric_sums, "")
        self._metric_sums.zero_()
        rate = learning_rate(self.settings.optimizer, self.step - 1)
        return metrics | {"grad_norm": float(norm), "learning_rate": rate}

    def _check_finite(self, metric_sums: Tensor) -> None:
        """Raise `Diverged` unless all sums are finite."""
        if not bool(torch.isfinite(metric_sums).all()):
            raise Diverged(
                f"the loss is not finite at step {self.step} or shortly before; "
                "restart with a lower learning rate in another output"
            )

    def _loss_metrics(self, metric_sums: Tensor, prefix: str) -> dict[str, MetricValue]:
        sums, counts = metric_sums.view(2, -1).tolist()
        text, *codebooks = [loss_sum / max(count, 1) for loss_sum, count in zip(sums, counts, strict=True)]
        weights = self.settings.loss.codebooks or (1.0,) * len(codebooks)
        audio = sum(weight * loss for weight, loss in zip(weights, codebooks, strict=True)) / sum(weights)
        total = self.settings.loss.text * text + self.settings.loss.audio * audio
        return {
            f"{prefix}loss": total,
            f"{prefix}text_loss": text,
            f"{prefix}audio_loss": audio,
            f"{prefix}codebook_losses": codebooks,
        }

    @torch.no_grad()
    def validate(self) -> dict[str, MetricValue]:
        """Return the losses on the validation data."""
        samples = self.corpus.validation
        if samples is None:
            raise BadConfig("cannot validate: data.validation is not set")
        batches = BatchSampler(samples, self.settings.data, self.settings.batch, 0, shuffle=False).epoch(0)
        metric_sums = torch.zeros_like(self._metric_sums)
        half = len(metric_sums) // 2
        self.model.eval()
        # All workers run the same number of passes, because FSDP needs all of them; surplus passes are not counted.
        rounds = math.ceil(len(batches) / self.workers.world_size)
        for index in range(rounds):
            number = index * self.workers.world_size + self.workers.rank
            batch = self._collate_batch(samples, batches[min(number, len(batches) - 1)])
            losses = self._compute_losses(self.objective, batch, torch.ones(half, device=self.workers.device))
            if number < len(batches):
                counts = torch.tensor([batch.num_labels, *batch.num_code_labels], dtype=torch.float64)
                metric_sums[:half] += torch.cat([losses.text[None], losses.codebooks])
                metric_sums[half:] += counts.to(metric_sums.device)
        self.model.train()
        return self._loss_metrics(self.workers.all_reduce_sum(metric_sums), "validation_")

    def _log(self, log: MetricsLog | None, metrics: Mapping[str, MetricValue]) -> None:
        if log is not None:
            log.write(self.step, metrics)
        if self._report is not None:
            self._report(self.step, metrics)

    def _save(self) -> None:
        settings = self.settings.model_dump(mode="json")
        progress = Progress(self.step, self._batches_done, settings, self.corpus.train.name)
        metric_sums = self.workers.all_reduce_sum(self._metric_sums.clone())
        self._check_finite(metric_sums)
        self._checkpoints.save(progress, self.model, self.optimizer, metric_sums, self.model_source, self.workers)

    def _export_model(self) -> None:
        """Write the trained model in all configured layouts."""
        settings = self.settings.checkpoints
        state = checkpoints.gather_weights(self.model, self.workers)
        if self.workers.is_main_process:
            for index, layout in enumerate(settings.layouts):
                folder = self.output / ("model" if index == 0 else f"model-{layout}")
                self.model.save_pretrained(folder, layout=layout, state=state, dtype=getattr(torch, settings.dtype))
                self.model_source.save_tokenizer(folder)
                self._add_codec(folder)
        self.workers.barrier()

    def _add_codec(self, folder: Path) -> None:
        """Copy the codec into the model's folder, if it is a local folder, so that the model is complete."""
        codec, checkpoint = self.settings.codec, self.model_source.checkpoint
        if codec is None and checkpoint is None:
            return
        source = Path(resolve_codec(checkpoint or "", codec))
        if source.is_dir():
            shutil.copytree(source, folder / "codec", dirs_exist_ok=True)

    @contextlib.contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """Handle the first SIGTERM or SIGINT by finishing the step and saving a checkpoint.

        With several workers the signal is not handled, since they would stop at different steps; they resume from the
        last checkpoint.
        """
        if self.workers.world_size > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            self._stopping = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _result_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that determine the result of a run, independently of hardware and outputs."""
    fixed = {name: value for name, value in settings.items() if name not in _CHANGEABLE_SETTINGS}
    # Fewer workers with more accumulation run the same steps.
    return fixed | {"batch": {**settings["batch"], "accumulate": None}}
