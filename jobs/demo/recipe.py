"""The demo's checkpoint, from nothing, in five stages:

    sentences, spoken ─▶ codec ─▶ tokenizer ─▶ model ─▶ one folder that loads like any other checkpoint

Each stage leaves its result in the working folder, and is not done again when that is there; one that was killed goes on
where it was. In: a `Recipe`. Knows the commands of the trainings, and how they are told; nothing of how they train.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from higgs_model.codec.checkpoint import write_checkpoint
from higgs_model.codec.codec import HiggsAudioCodec
from higgs_model.demo.tokenizer import build_tokenizer
from higgs_model.errors import BadConfig
from jobs import train_codec
from jobs.commands import say
from jobs.demo import data
from jobs.train import train
from jobs.train_codec import CodecJob

MAX_BYTES = 24_000_000
"""Of what is embedded: it lies in the repository."""


class DataSettings(BaseModel):
    """How many sentences.

    Attributes:
        sentences: to train on, of each language.
        held_out: of each language, in known voices, and as many in new ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sentences: dict[str, int]
    held_out: int = Field(ge=1)


class TokenizerSettings(BaseModel):
    """How text is cut: into bytes, and `merges` frequent pairs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    merges: int = Field(0, ge=0)


class Recipe(BaseModel):
    """All that decides the checkpoint; `codec` and `model` are the trainings' own settings, without paths."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    data: DataSettings
    codec: dict[str, Any]
    tokenizer: TokenizerSettings
    model: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a YAML file.

        Raises:
            BadConfig: it is none, or something in it is unknown.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (yaml.YAMLError, ValidationError) as error:
            raise BadConfig(f"{path}: {error}") from error


def make(recipe: Recipe, work: Path, output: Path) -> None:
    """Go through the stages; `output` becomes the checkpoint's folder."""
    work = work.absolute()
    say("1 of 5: sentences, spoken")
    data.make(work / "data", recipe.data.sentences, recipe.data.held_out, recipe.seed)
    say("2 of 5: the codec")
    train_codec.train(codec_job(recipe, work))
    halve_codec(work / "codec", work / "checkpoint" / "codec")
    say("3 of 5: the tokenizer")
    texts = (json.loads(line)["text"] for line in (work / "data" / "train.jsonl").open(encoding="utf-8"))
    build_tokenizer(texts, recipe.tokenizer.merges).save_pretrained(work / "tokenizer")
    say("4 of 5: the model")
    settings = work / "model.yaml"
    settings.write_text(yaml.safe_dump(model_settings(recipe, work)), encoding="utf-8")
    if train(["--config", str(settings)]) != 0:
        raise BadConfig("the model's training was stopped; run the same command again to go on")
    say("5 of 5: one folder")
    pack(work, output)


def codec_job(recipe: Recipe, work: Path) -> CodecJob:
    """The codec's training."""
    return CodecJob.model_validate(
        recipe.codec | {"output": work / "codec", "manifest": work / "data" / "train.jsonl"}
    )


def model_settings(recipe: Recipe, work: Path) -> dict[str, Any]:
    """The model's training, as its command reads it."""
    manifests = {"manifest": str(work / "data" / "train.jsonl"), "validation": str(work / "data" / "text.jsonl")}
    return recipe.model | {
        "output": str(work / "model"),
        "codec": str(work / "checkpoint" / "codec"),
        "seed": recipe.seed,
        "init": recipe.model["init"] | {"tokenizer": str(work / "tokenizer")},
        "data": recipe.model["data"] | manifests,
    }


def halve_codec(trained: Path, folder: Path) -> None:
    """Write a codec again in half precision. The model learns the codes of this one, which is the one that is embedded."""
    codec = HiggsAudioCodec.from_pretrained(trained)
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in codec.state_dict().items()}
    write_checkpoint(folder, codec.config, state, "transformers")


def pack(work: Path, output: Path) -> None:
    """Put model, tokenizer and codec where they are loaded from."""
    folder = work / "checkpoint"
    shutil.copytree(work / "model" / "model", folder, dirs_exist_ok=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise BadConfig(f"{folder} has {size / 1e6:.1f} MB; what is embedded may have {MAX_BYTES / 1e6:.0f}")
    if output.exists():
        shutil.rmtree(output)
    shutil.copytree(folder, output)
    parameters = sum(tensor.numel() for tensor in torch.nn.Module.parameters(HiggsAudioCodec.from_pretrained(output / "codec")))
    say(f"{output}: {size / 1e6:.1f} MB; the codec has {parameters / 1e6:.1f} M parameters")
