"""Trains a codec on recordings, from scratch or from a checkpoint.

    python -m jobs.train_codec --config codec.yaml

The file sets `manifest` (JSON lines with the path of a recording in `audio`), `output`, either `codec` (the network's
configuration) or `checkpoint`, and `training` (see `higgs_model.training.codec`). The output folder gets `log.jsonl`
(a line every `log_every` steps), `state.pt` (from which the same command resumes) and, at the end, the checkpoint.
Exit status: 0 finished · 2 invalid settings or recordings.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from higgs_model.audio.resample import resample
from higgs_model.audio.waveform import to_mono
from higgs_model.codec.checkpoint import Layout
from higgs_model.codec.codec import HiggsAudioCodec
from higgs_model.codec.config import HiggsAudioCodecConfig, semantic_config
from higgs_model.errors import BadConfig, BadInput
from higgs_model.training.codec import CodecTrainer, CodecTraining
from higgs_model.training.recordings import Recordings
from jobs.runtime.cli import ArgumentParser, print_status, run_command

_STATE, _CONFIG = "state.pt", "config.json"


class CodecJob(BaseModel):
    """Settings of a codec training.

    Attributes:
        codec: fields of `HiggsAudioCodecConfig`; `semantic` is the semantic model's configuration.
        max_hours: hours of recordings to train on, drawn with the seed; they are kept in memory.
        threads: CPU threads; None uses all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path
    manifest: Path
    training: CodecTraining
    codec: dict[str, Any] | None = None
    checkpoint: str | None = None
    layout: Layout = "transformers"
    max_hours: float = Field(20.0, gt=0)
    log_every: int = Field(10, ge=1)
    save_every: int = Field(200, ge=1)
    device: str = "cpu"
    threads: int | None = Field(None, ge=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the training that a command line describes and return the exit status."""
    return run_command(_main, arguments)


def _main(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m jobs.train_codec", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="YAML; see `CodecJob`")
    path = parser.parse_args(arguments).config
    try:
        job = CodecJob.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise BadConfig(f"{path}: {error}") from error
    train(job)
    return 0


def train(job: CodecJob) -> HiggsAudioCodec:
    """Start or resume a training and return its codec; a finished training is only loaded."""
    if (job.output / _CONFIG).exists():
        return HiggsAudioCodec.from_pretrained(job.output)
    job.output.mkdir(parents=True, exist_ok=True)
    trainer, state = load_trainer(job), job.output / _STATE
    if trainer.step:
        print_status(f"resuming from step {trainer.step}")
    started = time.perf_counter()
    with (job.output / "log.jsonl").open("a", encoding="utf-8") as log:
        while trainer.step < job.training.steps:
            losses, distance = trainer.run_step()
            if trainer.step % job.log_every == 0:
                metrics = {name: round(float(loss.detach()), 4) for name, loss in vars(losses).items()}
                metrics["taught"] = round(float(distance), 4)
                seconds = round(time.perf_counter() - started, 1)
                log.write(json.dumps({"step": trainer.step, **metrics, "seconds": seconds}) + "\n")
                log.flush()
            if trainer.step % job.save_every == 0:
                trainer.save(state)
    trainer.save(state)
    _publish(trainer.codec.eval(), job)
    return trainer.codec


def _publish(codec: HiggsAudioCodec, job: CodecJob) -> None:
    """Write the checkpoint, its configuration last: that file marks the training as finished."""
    draft = job.output / ".checkpoint.part"
    shutil.rmtree(draft, ignore_errors=True)
    codec.save_pretrained(draft, job.layout)
    for path in sorted(draft.iterdir(), key=lambda path: path.name == _CONFIG):
        os.replace(path, job.output / path.name)
    draft.rmdir()


def load_trainer(job: CodecJob) -> CodecTrainer:
    """Load the trainer, resumed from its last saved state if there is one."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    torch.manual_seed(job.training.seed)
    codec = _build_codec(job).to(job.device)
    return CodecTrainer(codec, job.training, _read_recordings(job, codec.sample_rate), job.output / _STATE)


def _build_codec(job: CodecJob) -> HiggsAudioCodec:
    if (job.codec is None) == (job.checkpoint is None):
        raise BadConfig("set either `codec`, to train from scratch, or `checkpoint`, to start from a checkpoint")
    if job.checkpoint is not None:
        if job.training.teach_semantic:
            raise BadConfig(
                "training.teach_semantic applies to training from scratch; a checkpoint has a trained semantic model"
            )
        return HiggsAudioCodec.from_pretrained(job.checkpoint)
    known = {field.name for field in dataclasses.fields(HiggsAudioCodecConfig)}
    values = dict(job.codec or {})
    if unknown := sorted(values.keys() - known):
        raise BadConfig(f"codec: unknown fields {', '.join(unknown)}; valid fields: {', '.join(sorted(known))}")
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    semantic = {"semantic": semantic_config(values["semantic"])} if "semantic" in values else {}
    return HiggsAudioCodec(HiggsAudioCodecConfig(**values | tuples | semantic))


def _read_recordings(job: CodecJob, sample_rate_hz: int) -> Recordings:
    try:
        with job.manifest.open(encoding="utf-8") as lines:
            paths = [json.loads(line)["audio"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{job.manifest}: each line must be a JSON object with `audio` ({error})") from error
    random.Random(job.training.seed).shuffle(paths)
    remaining, recordings = job.max_hours * 3600 * sample_rate_hz, []
    for path in paths:
        try:
            samples, rate_hz = soundfile.read(path, dtype="int16", always_2d=True)
        except soundfile.SoundFileError as error:
            raise BadInput(f"{job.manifest}: {path} cannot be read: {error}") from error
        if rate_hz != sample_rate_hz or samples.shape[1] != 1:
            mono = to_mono((samples.T / 32768).astype("float32"))
            recordings.append(resample(mono, rate_hz, sample_rate_hz))
        else:
            recordings.append(samples[:, 0])
        remaining -= len(recordings[-1])
        if remaining <= 0:
            break
    return Recordings(recordings)


if __name__ == "__main__":
    sys.exit(main())
