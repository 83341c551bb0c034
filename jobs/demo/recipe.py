"""The demo's checkpoint, from nothing, in stages:

    sentences, spoken ─▶ codec ─▶ codes ─▶ tokenizer ─▶ model ─▶ one folder that loads like any other checkpoint

Each stage leaves its result in the working folder, and is not done again when that is there; one that was killed goes
on where it was. The folder is one recipe's. In: a `Recipe`. Knows the commands of the trainings, and how they are told;
nothing of how they train.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from higgs_model.codec.checkpoint import write_checkpoint
from higgs_model.codec.codec import HiggsAudioCodec
from higgs_model.errors import BadConfig, BadInput
from jobs import train_codec
from jobs.demo import codes, data
from jobs.demo.tokenizer import build_tokenizer
from jobs.runtime.cli import print_status
from jobs.storage.backends import open_storage
from jobs.train import train
from jobs.train_codec import CodecJob

RECIPE = Path(__file__).with_name("recipe.yaml")
MAX_BYTES = 24_000_000
"""Of what is embedded: it lies in the repository."""


class DataSettings(BaseModel):
    """How many sentences.

    Attributes:
        sentences: to train on, of each language.
        held_out: of each language, in known voices, and as many in new ones.
        conversations: put together of the sentences to train on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sentences: dict[str, int]
    held_out: int = Field(ge=1)
    conversations: int = Field(0, ge=0)


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
    _claim(work, recipe)
    print_status("1 of 6: sentences, spoken")
    data.make(work / "data", recipe.data.sentences, recipe.data.held_out, recipe.seed)
    print_status("2 of 6: the codec")
    train_codec.train(codec_job(recipe, work))
    halve_codec(work / "codec", work / "checkpoint" / "codec")
    print_status("3 of 6: its codes of all that was spoken")
    _write_codes(recipe, work)
    print_status("4 of 6: the tokenizer")
    texts = (row["text"] for row in data.read_rows(work / "data" / "train.jsonl"))
    build_tokenizer(texts, recipe.tokenizer.merges).save_pretrained(work / "tokenizer")
    print_status("5 of 6: the model")
    settings = work / "model.yaml"
    settings.write_text(yaml.safe_dump(model_settings(recipe, work)), encoding="utf-8")
    if train(["--config", str(settings)]) != 0:
        raise BadInput("the model's training did not come to its end; the same command goes on with it")
    print_status("6 of 6: one folder")
    pack(work, output)


def codec_job(recipe: Recipe, work: Path) -> CodecJob:
    """The codec's training."""
    return CodecJob.model_validate(recipe.codec | {"output": work / "codec", "manifest": work / "data" / "train.jsonl"})


def model_settings(recipe: Recipe, work: Path) -> dict[str, Any]:
    """The model's training, as its command reads it."""
    manifests = {"manifest": str(work / "codes" / "train.jsonl"), "validation": str(work / "codes" / "text.jsonl")}
    return recipe.model | {
        "output": str(work / "model"),
        "seed": recipe.seed,
        "init": recipe.model["init"] | {"tokenizer": str(work / "tokenizer")},
        "data": recipe.model["data"] | manifests,
    }


def halve_codec(trained: Path, folder: Path) -> None:
    """Write a codec again in half precision, which is how it is embedded."""
    codec = HiggsAudioCodec.from_pretrained(trained)
    state = codec.state_dict()
    halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    write_checkpoint(folder, codec.config, halved, "transformers")


def _write_codes(recipe: Recipe, work: Path) -> None:
    if data.finished(work / "codes"):
        return
    # It is one recording at a time, wherever the codec was trained.
    trainer = train_codec.load_trainer(codec_job(recipe, work).model_copy(update={"device": "cpu"}))
    codec = HiggsAudioCodec.from_pretrained(work / "checkpoint" / "codec")
    count, seed = recipe.data.conversations, recipe.seed
    codes.make(work / "data", work / "codes", trainer.target_codes, codec, count, seed)


def _claim(work: Path, recipe: Recipe) -> None:
    """One folder belongs to one recipe; the model's settings are the training's own to compare."""
    wanted = recipe.model_dump(mode="json", exclude={"model"})
    folder = open_storage(str(work))
    try:
        found = json.loads(folder.read("recipe.json"))
    except FileNotFoundError:
        folder.write("recipe.json", json.dumps(wanted, indent=2).encode())
        return
    if differ := sorted(name for name in wanted if found.get(name) != wanted[name]):
        raise BadInput(f"{work} was begun with another recipe ({', '.join(differ)}); give another --work, or remove it")


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
    for path in output.rglob("*.safetensors"):
        # Else only their owner could read them, wherever they are installed.
        path.chmod(0o644)
    print_status(f"{output}: {size / 1e6:.1f} MB")
