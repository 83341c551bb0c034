"""One worker of a training, from settings and prepared samples; the same in a process of its own and on a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from higgs_model.synthesizer.loading import load_codec
from higgs_model.training.journal import Value
from higgs_model.training.loading import Trainee
from higgs_model.training.previews import Previewer
from higgs_model.training.settings import TrainingSettings
from higgs_model.training.trainer import Corpus, Report, Trainer
from higgs_model.training.workers import Workers
from jobs.storage.uris import open_voices
from jobs.train.prepare import open_samples


class WorkersFailed(Exception):
    """A worker failed, more often than it is tried again."""


def train_here(settings: TrainingSettings, folders: Sequence[Path], workers: Workers, report: Report) -> bool:
    """The training loop in this process, as one of the workers; False if it was told to stop before its end.

    Args:
        folders: of prepared samples: those that are learnt and, if there are any, those that it is tried on.
    """
    trainee = Trainee.of(settings.init)
    corpus = Corpus(*(open_samples(settings, folder, trainee) for folder in folders))
    preview = _previewer(settings, trainee) if workers.is_first else None
    return Trainer(settings, trainee, corpus, workers, report=report, preview=preview).run()


def _previewer(settings: TrainingSettings, trainee: Trainee) -> Previewer | None:
    if settings.previews is None:
        return None
    codec = load_codec(settings.init.checkpoint or "", settings.codec, torch.device("cpu"))
    voices = open_voices(settings.data.voices)
    return Previewer(settings.previews, trainee.tokenizer, codec, voices, Path(settings.output))


def told_line(step: int, values: Mapping[str, Value]) -> str:
    """What is known after a step, for people."""
    shown = {name: value for name, value in values.items() if isinstance(value, float | int)}
    return f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
