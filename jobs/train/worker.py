"""One training worker, from settings and prepared samples; the same code in a single process and on a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from higgs_model.synthesizer.loading import load_codec
from higgs_model.training.metrics_log import MetricValue
from higgs_model.training.model_source import ModelSource
from higgs_model.training.previews import Previewer
from higgs_model.training.settings import TrainingSettings
from higgs_model.training.trainer import Corpus, MetricsCallback, Trainer
from higgs_model.training.workers import WorkerGroup
from jobs.storage.uris import open_voices
from jobs.train.prepare import open_samples


class WorkersFailed(Exception):
    """Workers failed more often than the allowed number of restarts."""


def train_in_process(
    settings: TrainingSettings, folders: Sequence[Path], workers: WorkerGroup, report: MetricsCallback
) -> bool:
    """Run the training loop in this process, as one of the workers.

    Args:
        folders: folders of prepared samples: the training set, optionally followed by the validation set.
        report: called with the step and its metrics.

    Returns:
        Whether the training finished; False if it was asked to stop earlier.
    """
    model_source = ModelSource.from_settings(settings.init)
    corpus = Corpus(*(open_samples(settings, folder, model_source) for folder in folders))
    preview = _build_previewer(settings, model_source) if workers.is_main_process else None
    return Trainer(settings, model_source, corpus, workers, report=report, preview=preview).run()


def _build_previewer(settings: TrainingSettings, model_source: ModelSource) -> Previewer | None:
    if settings.previews is None:
        return None
    codec = load_codec(settings.init.checkpoint or "", settings.codec, torch.device("cpu"))
    voices = open_voices(settings.data.voices)
    return Previewer(settings.previews, model_source.tokenizer, codec, voices, Path(settings.output))


def format_metrics(step: int, values: Mapping[str, MetricValue]) -> str:
    """Format the scalar metrics of a step as one line of text."""
    scalars = {name: value for name, value in values.items() if isinstance(value, float | int)}
    return f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
