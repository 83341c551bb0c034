"""`python -m jobs.train --config train.yaml`: fine-tune a checkpoint, or train a network from nothing.

    settings ─▶ prepare the manifests ─▶ the training loop, here or in Ray Train's workers ─▶ OUT/model

Without `--workers` all of it happens in this process; with it, Ray Data prepares and Ray Train runs the same loop in so
many workers. The same command goes on where it was killed. Exit status: 0 it is done · 1 it broke, or was stopped ·
2 bad settings or data, in a sentence.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from higgs_model.synthesizer.loading import load_codec
from higgs_model.training.journal import Value
from higgs_model.training.loading import Trainee
from higgs_model.training.previews import Previewer
from higgs_model.training.settings import TrainingSettings, load_settings
from higgs_model.training.trainer import Corpus, Diverged, Trainer
from higgs_model.training.workers import Workers
from jobs.commands import Arguments, run_command, say
from jobs.prepare import open_samples, prepare
from jobs.storage import open_voices

BROKEN = 1


def train(arguments: Sequence[str]) -> int:
    """Run what a command line describes; gives the exit status."""
    flags = _parser().parse_args(arguments)
    overrides = {} if flags.output is None else {"output": flags.output}
    settings = load_settings(flags.config, overrides)
    if settings.parallel == "fsdp" and not flags.workers:
        flags.workers = 1
    trainee = Trainee.of(settings.init)
    data = settings.data
    folders = [prepare(settings, uri, trainee, flags.workers) for uri in (data.manifest, data.validation) if uri]
    try:
        if flags.workers:
            from jobs.train_cluster import train_on_cluster

            done = train_on_cluster(settings, folders, flags.workers)
        else:
            done = train_here(settings, folders, Workers.here(settings.device), _told)
    except Diverged as error:
        say(f"error: {error}")
        return BROKEN
    output = Path(settings.output)
    say(f"done; the model is in {output / 'model'}" if done else "stopped; run the same command again to go on")
    return 0 if done else BROKEN


def train_here(settings: TrainingSettings, folders: Sequence[Path], workers: Workers, report: Any) -> bool:
    """The training loop in this process, as one of the workers; False if it was told to stop before its end."""
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


def _told(step: int, values: Mapping[str, Value]) -> None:
    shown = {name: value for name, value in values.items() if isinstance(value, float | int)}
    say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))


def _parser() -> Arguments:
    parser = Arguments(
        prog="python -m jobs.train", description="Fine-tune a checkpoint, or train a network from nothing."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file with the settings")
    parser.add_argument("--output", metavar="FOLDER", help="in place of the file's")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes on the Ray cluster; by default this one alone, without Ray"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(train))
