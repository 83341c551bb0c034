"""The training loop, in one process or in each of several.

    batches, numbered ─▶ collated ahead ─▶ step: passes, one clipped update ─▶ log, validation, previews, snapshot

What is computed in a step follows from the settings, the data and the step's number alone, so a training that was
killed goes on as if nothing had been. The host waits for the device only when a line is logged. Knows no cluster and no
tables.
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
from higgs_model.synthesizer.loading import codec_of
from higgs_model.training import snapshots
from higgs_model.training.batch import Batch
from higgs_model.training.batches import Batches, Drawn, Samples
from higgs_model.training.collator import Collator
from higgs_model.training.journal import Journal, Value
from higgs_model.training.loading import Trainee
from higgs_model.training.objective import Losses, Objective
from higgs_model.training.optimizer import build_optimizer, freeze, learning_rate
from higgs_model.training.settings import TrainingSettings
from higgs_model.training.snapshots import Progress, Snapshots
from higgs_model.training.workers import Workers

Report = Callable[[int, Mapping[str, Value]], None]
Preview = Callable[[int, torch.nn.Module], None]

_BATCHES_AHEAD = 4
_MAY_CHANGE = (
    *("checkpoints", "previews", "log_every", "validate_every", "device", "parallel", "gradient_checkpointing"),
    *("output", "codec"),
)
"""Settings that a training may be gone on with other values of."""


class Diverged(HiggsError):
    """The loss is no number any more."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What is learnt, and what it is tried on."""

    train: Samples
    validation: Samples | None = None


class Trainer:
    """One worker of one training.

    Args:
        report: told the first worker's log, besides the journal.
        preview: lets the network speak after a step; for the first worker, the others wait for it in the next step.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        trainee: Trainee,
        corpus: Corpus,
        workers: Workers | None = None,
        *,
        report: Report | None = None,
        preview: Preview | None = None,
    ) -> None:
        self.settings, self.trainee, self.corpus = settings, trainee, corpus
        self.workers = workers or Workers.here(settings.device)
        self._report, self._preview = report, preview
        self.output = Path(settings.output)
        if corpus.validation is not None and not len(corpus.validation):
            raise BadInput(f"the manifest {settings.data.validation!r} has no sample that can be tried")
        self._snapshots = Snapshots(self.output, settings.checkpoints.keep)
        state = self._snapshots.latest()
        self.step, self._batches_done = self._begun(state)
        source = trainee if state is None else dataclasses.replace(trainee, checkpoint=state)
        self.model = source.build(settings.seed, self.workers.device).train()
        freeze(self.model, settings.freeze)
        if settings.gradient_checkpointing:
            # The older name goes away in transformers 6, the newer is not there before 5.2x.
            enable = getattr(self.model, "activation_checkpointing_enable", None)
            (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        objective = Objective(self.model, settings.loss)
        self.wrapped = self.workers.wrap(objective, settings.parallel, settings.precision)
        self.optimizer = build_optimizer(self.model, settings.optimizer)
        num_books = self.model.config.audio_num_codebooks
        self._window = torch.zeros(2 * (1 + num_books), dtype=torch.float64, device=self.workers.device)
        if state is not None:
            window = snapshots.restore_optimizer(state, self.model, self.optimizer)
            self._window.copy_(window / self.workers.count)
        self._collate = Collator(self.model.config)
        self._stopping = False

    def _begun(self, state: Path | None) -> tuple[int, int]:
        """Steps and batches that were done before; refuses what would not be the same training."""
        if state is None:
            return 0, 0
        progress = snapshots.read_progress(state)
        now, before = _fixed(self.settings.model_dump(mode="json")), _fixed(progress.settings)
        differ = [name for name, value in now.items() if before.get(name) != value]
        if differ:
            raise BadConfig(
                f"{self.output} holds a training with other settings ({', '.join(differ)}); "
                "give another output, or remove it"
            )
        if progress.data not in ("", self.corpus.train.name):
            raise BadConfig(
                f"{self.output} holds a training on other data: the manifest {self.settings.data.manifest!r}, its "
                "voices or the codec have changed; give another output, or remove it"
            )
        return progress.step, progress.batches

    # ------------------------------------------------------------------ the loop

    def run(self) -> bool:
        """Train to the end; False if it was told to stop before, having kept its state."""
        total, first = self.settings.optimizer.steps, self.workers.is_first
        with contextlib.ExitStack() as held:
            journal = held.enter_context(contextlib.closing(Journal(self.output, self.step))) if first else None
            held.enter_context(self._told_to_stop())
            ahead = held.enter_context(contextlib.closing(self._batches()))
            began_s, positions = time.perf_counter(), 0
            while self.step < total and not self._stopping:
                batches = list(itertools.islice(ahead, self.settings.batch.accumulate))
                norm = self._update([batch for _, batch in batches])
                self.step += 1
                self._batches_done += len(batches) * self.workers.count
                positions += sum(batch.places.num_real for _, batch in batches)
                if self._due(self.settings.log_every):
                    values = self._measured(norm) | {"epoch": batches[-1][0]}
                    now_s = time.perf_counter()
                    speed = positions * self.workers.count / (now_s - began_s)
                    self._tell(journal, values | {"positions_per_s": round(speed, 1)})
                    began_s, positions = now_s, 0
                self._after(journal)
        if not self._due(self.settings.checkpoints.every) or self.step == total:
            self._save()
        if self.step == total:
            self._finish()
        return self.step == total

    def _update(self, batches: Sequence[Batch]) -> Tensor:
        """One step of the optimizer; gives the norm of the gradient, on the device."""
        settings, workers = self.settings, self.workers
        torch.manual_seed(hash((settings.seed, self.step, workers.rank)))
        counts = torch.tensor([[batch.num_labels, *batch.num_code_labels] for batch in batches], dtype=torch.float64)
        counts = counts.sum(dim=0)
        if workers.device.type == "cuda":
            counts = counts.pin_memory()
        counts = workers.total(counts.to(workers.device, non_blocking=True))
        for at, batch in enumerate(batches):
            with workers.holding_back(self.wrapped, at == len(batches) - 1):
                losses = self._pass(self.wrapped, batch, counts.float())
                # Workers' gradients are averaged, and all have divided by what all of them learn.
                (losses.total * workers.count).backward()
            with torch.no_grad():
                self._window[: len(counts)] += torch.cat([losses.text.detach()[None], losses.codebooks.detach()])
        self._window[len(counts) :] += counts / workers.count
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.optimizer.clip_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings.optimizer, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _pass(self, objective: torch.nn.Module, batch: Batch, counts: Tensor) -> Losses:
        """One batch through the network."""
        device = self.workers.device
        mixed = self.settings.precision == "bfloat16" and self.settings.parallel != "fsdp"
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            losses: Losses = objective(batch.to(device), counts)
        return losses

    def _batches(self) -> Generator[tuple[int, Batch]]:
        """This worker's batches from here on, each with its epoch, collated ahead in a thread."""
        settings, workers = self.settings, self.workers
        batches = Batches(self.corpus.train, settings.data, settings.batch, settings.seed)
        mine = itertools.islice(batches.after(self._batches_done), workers.rank, None, workers.count)
        on_gpu = workers.device.type == "cuda"
        ready: queue.Queue[tuple[int, Batch] | BaseException] = queue.Queue(_BATCHES_AHEAD)
        ended = threading.Event()

        def collate() -> None:
            try:
                for epoch, rows in mine:
                    batch = self._collated(self.corpus.train, rows)
                    ready.put((epoch, batch.pinned() if on_gpu else batch))
                    if ended.is_set():
                        return
            except BaseException as error:  # noqa: BLE001  (raised where the batch is wanted)
                ready.put(error)

        threading.Thread(target=collate, name="collator", daemon=True).start()
        try:
            while True:
                found = ready.get()
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            ended.set()
            with contextlib.suppress(queue.Empty):
                while True:
                    ready.get_nowait()

    def _collated(self, samples: Samples, rows: Sequence[Sequence[Drawn]]) -> Batch:
        return self._collate([[samples.example(drawn) for drawn in row] for row in rows])

    # ------------------------------------------------------------------ beside the loop

    def _due(self, every: int) -> bool:
        return self.step % every == 0

    def _after(self, journal: Journal | None) -> None:
        """What is done after some steps."""
        settings, last = self.settings, self.step == self.settings.optimizer.steps
        if self.corpus.validation is not None and (last or self._due(settings.validate_every)):
            self._tell(journal, self.validate())
        if settings.previews is not None and self._preview and (last or self._due(settings.previews.every)):
            self.model.eval()
            self._preview(self.step, self.model)
            self.model.train()
        if self._due(settings.checkpoints.every) and not last:
            self._save()

    def _measured(self, norm: Tensor) -> dict[str, Value]:
        """The losses since the last time, of all workers; waits for the device."""
        window = self.workers.total(self._window.clone())
        self._check(window)
        values = self._losses(window, "")
        self._window.zero_()
        rate = learning_rate(self.settings.optimizer, self.step - 1)
        return values | {"grad_norm": float(norm), "learning_rate": rate}

    def _check(self, window: Tensor) -> None:
        """See that the losses of some steps are numbers, before anything is made of them."""
        if not bool(torch.isfinite(window).all()):
            raise Diverged(
                f"the loss is no number at step {self.step} or a little before; "
                "begin again with a lower learning rate, in another output"
            )

    def _losses(self, window: Tensor, prefix: str) -> dict[str, Value]:
        sums, counts = window.view(2, -1).tolist()
        text, *books = [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]
        weights = self.settings.loss.codebooks or (1.0,) * len(books)
        audio = sum(weight * book for weight, book in zip(weights, books, strict=True)) / sum(weights)
        total = self.settings.loss.text * text + self.settings.loss.audio * audio
        return {
            f"{prefix}loss": total,
            f"{prefix}text_loss": text,
            f"{prefix}audio_loss": audio,
            f"{prefix}codebook_losses": books,
        }

    @torch.no_grad()
    def validate(self) -> dict[str, Value]:
        """The losses on what is not learnt."""
        samples = self.corpus.validation
        if samples is None:
            raise BadConfig("there is nothing to validate on: data.validation is not given")
        batches = Batches(samples, self.settings.data, self.settings.batch, 0, shuffle=False).epoch(0)
        window = torch.zeros_like(self._window)
        half = len(window) // 2
        self.model.eval()
        # All workers run as many passes, so that none waits for parameters of the others; what comes twice counts not.
        rounds = math.ceil(len(batches) / self.workers.count)
        for at in range(rounds):
            number = at * self.workers.count + self.workers.rank
            batch = self._collated(samples, batches[min(number, len(batches) - 1)])
            losses = self._pass(self.wrapped, batch, torch.ones(half, device=self.workers.device))
            if number < len(batches):
                counts = torch.tensor([batch.num_labels, *batch.num_code_labels], dtype=torch.float64)
                window[:half] += torch.cat([losses.text[None], losses.codebooks])
                window[half:] += counts.to(window.device)
        self.model.train()
        return self._losses(self.workers.total(window), "validation_")

    def _tell(self, journal: Journal | None, values: Mapping[str, Value]) -> None:
        if journal is not None:
            journal.tell(self.step, values)
        if self._report is not None:
            self._report(self.step, values)

    def _save(self) -> None:
        settings = self.settings.model_dump(mode="json")
        progress = Progress(self.step, self._batches_done, settings, self.corpus.train.name)
        window = self.workers.total(self._window.clone())
        self._check(window)
        self._snapshots.save(progress, self.model, self.optimizer, window, self.trainee, self.workers)

    def _finish(self) -> None:
        """Write the trained model, in each layout that is wanted."""
        wanted = self.settings.checkpoints
        state = snapshots.whole_weights(self.model, self.workers)
        if self.workers.is_first:
            for at, layout in enumerate(wanted.layouts):
                folder = self.output / ("model" if at == 0 else f"model-{layout}")
                self.model.save_pretrained(folder, layout=layout, state=state, dtype=getattr(torch, wanted.dtype))
                self.trainee.save_tokenizer(folder)
                self._add_codec(folder)
        self.workers.wait()

    def _add_codec(self, folder: Path) -> None:
        """Put the codec beside the weights, if it is a folder, so that the result speaks as it is."""
        given, checkpoint = self.settings.codec, self.trainee.checkpoint
        if given is None and checkpoint is None:
            return
        source = Path(codec_of(checkpoint or "", given))
        if source.is_dir():
            shutil.copytree(source, folder / "codec", dirs_exist_ok=True)

    @contextlib.contextmanager
    def _told_to_stop(self) -> Iterator[None]:
        """A first SIGTERM or interrupt lets the step end and keeps the state.

        Several workers would not stop at the same step; they die where they are, and go on from the last state.
        """
        if self.workers.count > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            self._stopping = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under which it is the same training, whatever it runs on."""
    kept = {name: value for name, value in settings.items() if name not in _MAY_CHANGE}
    # Fewer workers with more passes each take the same steps.
    return kept | {"batch": {**settings["batch"], "accumulate": None}}
