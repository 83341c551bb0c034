"""Builds the demo checkpoint from scratch, in stages:

    dataset ─▶ codec ─▶ codes ─▶ tokenizer ─▶ model ─▶ one checkpoint folder

Each stage writes its result to the working folder and is skipped when the result exists; an interrupted stage resumes.
A working folder belongs to one recipe. In: a `Recipe`. The trainings themselves are `jobs.train_codec` and
`jobs.train`.
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
from jobs.demo import dataset, encode
from jobs.demo.tokenizer import build_tokenizer
from jobs.runtime.cli import print_status
from jobs.storage.backends import open_storage
from jobs.train import train
from jobs.train_codec import CodecJob

RECIPE = Path(__file__).with_name("recipe.yaml")
MAX_BYTES = 24_000_000
"""Largest size of the checkpoint, which is part of the repository."""


class DataSettings(BaseModel):
    """Size of the dataset.

    Attributes:
        sentences: training sentences per language.
        held_out: held-out sentences per language in training voices, and as many in held-out voices.
        conversations: conversations built from the training sentences.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sentences: dict[str, int]
    held_out: int = Field(ge=1)
    conversations: int = Field(0, ge=0)


class TokenizerSettings(BaseModel):
    """The tokenizer: bytes, and `merges` learned merges."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    merges: int = Field(0, ge=0)


class Recipe(BaseModel):
    """Everything that determines the checkpoint; `codec` and `model` are the trainings' settings, without paths."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    data: DataSettings
    codec: dict[str, Any]
    tokenizer: TokenizerSettings
    model: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a recipe from a YAML file.

        Raises:
            BadConfig: the file is not valid YAML, or has unknown or invalid fields.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (yaml.YAMLError, ValidationError) as error:
            raise BadConfig(f"{path}: {error}") from error


def build_checkpoint(recipe: Recipe, work: Path, output: Path) -> None:
    """Run all stages in the folder `work`, then replace the folder `output` by the checkpoint.

    Raises:
        BadInput: `work` belongs to another recipe, or the model's training did not finish.
        BadConfig: the checkpoint is larger than `MAX_BYTES`.
    """
    work = work.absolute()
    _check_work_folder(work, recipe)
    print_status("1 of 6: synthesizing the dataset")
    dataset.synthesize_dataset(work / "data", recipe.data.sentences, recipe.data.held_out, recipe.seed)
    print_status("2 of 6: training the codec")
    train_codec.train(codec_job(recipe, work))
    save_half_precision_codec(work / "codec", work / "checkpoint" / "codec")
    print_status("3 of 6: encoding the dataset")
    _encode_dataset(recipe, work)
    print_status("4 of 6: training the tokenizer")
    texts = (row["text"] for row in dataset.read_rows(work / "data" / "train.jsonl"))
    build_tokenizer(texts, recipe.tokenizer.merges).save_pretrained(work / "tokenizer")
    print_status("5 of 6: training the model")
    settings = work / "model.yaml"
    settings.write_text(yaml.safe_dump(model_settings(recipe, work)), encoding="utf-8")
    if train(["--config", str(settings)]) != 0:
        raise BadInput("the model's training did not finish; run the same command again to resume it")
    print_status("6 of 6: assembling the checkpoint")
    assemble_checkpoint(work, output)


def codec_job(recipe: Recipe, work: Path) -> CodecJob:
    """Return the settings of the codec's training."""
    return CodecJob.model_validate(recipe.codec | {"output": work / "codec", "manifest": work / "data" / "train.jsonl"})


def model_settings(recipe: Recipe, work: Path) -> dict[str, Any]:
    """Return the settings of the model's training, as `jobs.train` reads them."""
    manifests = {"manifest": str(work / "codes" / "train.jsonl"), "validation": str(work / "codes" / "text.jsonl")}
    return recipe.model | {
        "output": str(work / "model"),
        "seed": recipe.seed,
        "init": recipe.model["init"] | {"tokenizer": str(work / "tokenizer")},
        "data": recipe.model["data"] | manifests,
    }


def save_half_precision_codec(trained: Path, folder: Path) -> None:
    """Save a copy of a trained codec in half precision."""
    codec = HiggsAudioCodec.from_pretrained(trained)
    state = codec.state_dict()
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    write_checkpoint(folder, codec.config, half, "transformers")


def _encode_dataset(recipe: Recipe, work: Path) -> None:
    if dataset.is_complete(work / "codes"):
        return
    # Recordings are encoded one at a time, so a GPU would not help.
    trainer = train_codec.load_trainer(codec_job(recipe, work).model_copy(update={"device": "cpu"}))
    codec = HiggsAudioCodec.from_pretrained(work / "checkpoint" / "codec")
    count, seed = recipe.data.conversations, recipe.seed
    encode.encode_dataset(work / "data", work / "codes", trainer.target_codes, codec, count, seed)


def _check_work_folder(work: Path, recipe: Recipe) -> None:
    """Raise `BadInput` if the folder belongs to another recipe; `jobs.train` compares the model's settings itself."""
    expected = recipe.model_dump(mode="json", exclude={"model"})
    storage = open_storage(str(work))
    try:
        found = json.loads(storage.read("recipe.json"))
    except FileNotFoundError:
        storage.write("recipe.json", json.dumps(expected, indent=2).encode())
        return
    if different := sorted(name for name in expected if found.get(name) != expected[name]):
        raise BadInput(
            f"{work} was started with another recipe ({', '.join(different)} differs); choose another --work, "
            "or delete it"
        )


def assemble_checkpoint(work: Path, output: Path) -> None:
    """Copy model, tokenizer and codec to one folder.

    Raises:
        BadConfig: they are larger than `MAX_BYTES`.
    """
    folder = work / "checkpoint"
    shutil.copytree(work / "model" / "model", folder, dirs_exist_ok=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise BadConfig(f"{folder} has {size / 1e6:.1f} MB; the demo checkpoint may have {MAX_BYTES / 1e6:.0f} MB")
    if output.exists():
        shutil.rmtree(output)
    shutil.copytree(folder, output)
    for path in output.rglob("*.safetensors"):
        # safetensors writes files that only their owner can read.
        path.chmod(0o644)
    print_status(f"{output}: {size / 1e6:.1f} MB")
