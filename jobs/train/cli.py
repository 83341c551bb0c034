"""`python -m jobs.train --config train.yaml`: fine-tune a checkpoint, or train a network from nothing.

    settings ─▶ prepare the manifests ─▶ the training loop, here or in Ray Train's workers ─▶ OUT/model

Without `--workers` all of it happens in this process; with it, Ray Data prepares and Ray Train runs the same loop in so
many workers. The same command goes on where it was killed. Exit status: 0 it is done · 1 it broke, or was stopped ·
2 bad settings or data, in a sentence.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jobs.runtime.cli import ArgumentParser, print_status

BROKEN = 1


def train(arguments: Sequence[str]) -> int:
    """Run what a command line describes; gives the exit status."""
    flags = _parser().parse_args(arguments)
    # Faulty command lines do not wait for torch.
    from higgs_model.training.model_source import ModelSource
    from higgs_model.training.settings import load_settings
    from higgs_model.training.trainer import Diverged
    from higgs_model.training.workers import WorkerGroup
    from jobs.train.prepare import prepare
    from jobs.train.worker import WorkersFailed, told_line, train_here

    overrides = {} if flags.output is None else {"output": flags.output}
    settings = load_settings(flags.config, overrides)
    if settings.parallel == "fsdp" and not flags.workers:
        flags.workers = 1
    model_source = ModelSource.from_settings(settings.init)
    data = settings.data
    folders = [prepare(settings, uri, model_source, flags.workers) for uri in (data.manifest, data.validation) if uri]
    try:
        if flags.workers:
            from jobs.train.cluster import train_on_cluster

            done = train_on_cluster(settings, folders, flags.workers)
        else:
            workers = WorkerGroup.current(settings.device)
            done = train_here(settings, folders, workers, lambda step, values: print_status(told_line(step, values)))
    except (Diverged, WorkersFailed) as error:
        print_status(f"error: {error}")
        return BROKEN
    output = Path(settings.output)
    print_status(
        f"done; the model is in {output / 'model'}" if done else "stopped; run the same command again to resume"
    )
    return 0 if done else BROKEN


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m jobs.train", description="Fine-tune a checkpoint, or train a network from nothing."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file with the settings")
    parser.add_argument("--output", metavar="FOLDER", help="in place of the file's")
    parser.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="processes on the Ray cluster; by default this one alone, without Ray",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
