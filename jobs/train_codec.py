"""A codec from recordings: from nothing, or going on from a checkpoint.

    python -m jobs.train_codec --config codec.yaml

The file names `manifest` (JSON lines with `audio`, a path each), `output`, and either `codec`, the network's
configuration, or `checkpoint`; `training` as in `higgs_model.training.codec`. In the output: `log.jsonl`, a line every
`log_every` steps; `state.pt`, from which the same command goes on after a stop; at the end the checkpoint. Exit status:
0 it is there · 2 bad settings or recordings.
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
    """One training.

    Attributes:
        codec: fields of `HiggsAudioCodecConfig`; `semantic` is the semantic model's configuration.
        max_hours: of recordings, drawn by the seed; they are held in memory.
        threads: of the processor; None: all.
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
    """Run the training that the command line names; gives the exit status."""
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
    """Train, or go on; what is finished is loaded."""
    if (job.output / _CONFIG).exists():
        return HiggsAudioCodec.from_pretrained(job.output)
    job.output.mkdir(parents=True, exist_ok=True)
    trainer, state = load_trainer(job), job.output / _STATE
    if trainer.step:
        print_status(f"going on from step {trainer.step}")
    started = time.perf_counter()
    with (job.output / "log.jsonl").open("a", encoding="utf-8") as log:
        while trainer.step < job.training.steps:
            losses, distance = trainer.run_step()
            if trainer.step % job.log_every == 0:
                told = {name: round(float(loss.detach()), 4) for name, loss in vars(losses).items()}
                told["taught"] = round(float(distance), 4)
                seconds = round(time.perf_counter() - started, 1)
                log.write(json.dumps({"step": trainer.step, **told, "seconds": seconds}) + "\n")
                log.flush()
            if trainer.step % job.save_every == 0:
                trainer.save(state)
    trainer.save(state)
    _publish(trainer.codec.eval(), job)
    return trainer.codec


def _publish(codec: HiggsAudioCodec, job: CodecJob) -> None:
    """Write the checkpoint; its configuration, by which it is known to be finished, comes last."""
    draft = job.output / ".checkpoint.part"
    shutil.rmtree(draft, ignore_errors=True)
    codec.save_pretrained(draft, job.layout)
    for path in sorted(draft.iterdir(), key=lambda path: path.name == _CONFIG):
        os.replace(path, job.output / path.name)
    draft.rmdir()


def load_trainer(job: CodecJob) -> CodecTrainer:
    """The training as it stands: at its beginning, or where it was left."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    torch.manual_seed(job.training.seed)
    codec = _codec(job).to(job.device)
    return CodecTrainer(codec, job.training, _recordings(job, codec.sample_rate), job.output / _STATE)


def _codec(job: CodecJob) -> HiggsAudioCodec:
    if (job.codec is None) == (job.checkpoint is None):
        raise BadConfig("a codec's training needs `codec`, to begin from nothing, or `checkpoint`, to go on from one")
    if job.checkpoint is not None:
        if job.training.teach_semantic:
            raise BadConfig(
                "training.teach_semantic is for a codec from nothing; a checkpoint's semantic model has learnt"
            )
        return HiggsAudioCodec.from_pretrained(job.checkpoint)
    known = {field.name for field in dataclasses.fields(HiggsAudioCodecConfig)}
    values = dict(job.codec or {})
    if unknown := sorted(values.keys() - known):
        raise BadConfig(f"codec: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    semantic = {"semantic": semantic_config(values["semantic"])} if "semantic" in values else {}
    return HiggsAudioCodec(HiggsAudioCodecConfig(**values | tuples | semantic))


def _recordings(job: CodecJob, sample_rate_hz: int) -> Recordings:
    try:
        with job.manifest.open(encoding="utf-8") as lines:
            paths = [json.loads(line)["audio"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{job.manifest}: wanted a JSON object with `audio` a line ({error})") from error
    random.Random(job.training.seed).shuffle(paths)
    left, recordings = job.max_hours * 3600 * sample_rate_hz, []
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
        left -= len(recordings[-1])
        if left <= 0:
            break
    return Recordings(recordings)


if __name__ == "__main__":
    sys.exit(main())
