"""`python -m jobs.train --config train.yaml`: fine-tune a checkpoint, or train a network from scratch.

    settings ─▶ prepare the manifests ─▶ training loop, in this process or in Ray Train workers ─▶ OUT/model

Without `--workers` everything runs in this process; with it, Ray Data prepares the data and Ray Train runs the same
loop in that many workers. Running the same command again resumes an interrupted training. Exit status: 0 finished ·
1 failed, or stopped early · 2 invalid settings or data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jobs.runtime.cli import ArgumentParser, print_status

FAILED = 1


def train(arguments: Sequence[str]) -> int:
    """Run the training that a command line describes and return the exit status."""
    flags = _build_parser().parse_args(arguments)
    # Importing torch takes seconds; an invalid command line fails before that.
    from higgs_model.training.model_source import ModelSource
    from higgs_model.training.settings import load_settings
    from higgs_model.training.trainer import Diverged
    from higgs_model.training.workers import WorkerGroup
    from jobs.train.prepare import prepare
    from jobs.train.worker import WorkersFailed, format_metrics, train_in_process

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
            done = train_in_process(
                settings, folders, workers, lambda step, values: print_status(format_metrics(step, values))
            )
    except (Diverged, WorkersFailed) as error:
        print_status(f"error: {error}")
        return FAILED
    output = Path(settings.output)
    print_status(
        f"done; the model is in {output / 'model'}" if done else "stopped; run the same command again to resume"
    )
    return 0 if done else FAILED


def _build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m jobs.train", description="Fine-tune a checkpoint, or train a network from scratch."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file with the settings")
    parser.add_argument("--output", metavar="FOLDER", help="output folder; overrides the file's")
    parser.add_argument(
        "--workers",
        type=_positive_int,
        metavar="N",
        help="workers on the Ray cluster; default: train in this process, without Ray",
    )
    return parser


def _positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
