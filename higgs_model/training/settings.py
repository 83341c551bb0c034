"""Everything that a training can be told: one strict object, read from YAML.

    init ─ what is trained · data ─ with what · batch, optimizer, loss, freeze ─ how · the rest ─ what is kept of it

Training from nothing and fine-tuning differ in `init` alone. An unknown key is refused with the nearest known one; all
faults are told at once, each by its place.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from higgs_model import demo
from higgs_model.errors import BadConfig
from higgs_model.script.script import Script, faults


def _from_anywhere(value: str) -> str:
    """A path means the same to workers, which run in folders of their own; the demo's name, hub ids and URIs stay."""
    path = Path(value).expanduser()
    return str(path.absolute()) if value != demo.NAME and "://" not in value and path.exists() else value


Place = Annotated[str, AfterValidator(_from_anywhere)]
"""A path, a URI or a hub id."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Init(_Settings):
    """What is trained: a checkpoint, or a network from nothing.

    Attributes:
        checkpoint: demo, a folder or a hub id, of either layout.
        config: a `config.json`'s path or its content. What it leaves out of special token ids and vocabulary size is
            taken from the tokenizer.
        tokenizer: folder or hub id; by default the checkpoint's own.
    """

    checkpoint: Place | None = None
    config: Place | dict[str, Any] | None = None
    tokenizer: Place | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.checkpoint is None) == (self.config is None):
            raise ValueError("give either checkpoint (fine-tuning) or config (training from nothing)")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("config needs a tokenizer: a folder or a hub id")
        return self


class Data(_Settings):
    """What is learnt; see `samples` for what a row may hold.

    Attributes:
        manifest, validation: JSON lines or Parquet, by path or URI.
        voices: library for rows that name a `voice`.
        reference: share of the samples of rows with a `speaker` that begin with another recording of that speaker, as
            a cloned voice does; drawn anew in each epoch.
        turns: rows of one speaker that may follow each other in a sample, as chunks of a long script do; how many do is
            drawn.
        bad_rows: how many rows may be faulty, and are left out; more end the training before it begins.
    """

    manifest: Place
    validation: Place | None = None
    voices: Place | None = None
    reference: float = Field(default=0.5, ge=0, le=1)
    turns: int = Field(default=1, ge=1, le=64)
    bad_rows: int = Field(default=0, ge=0)


class Batch(_Settings):
    """How much is computed at a time.

    Attributes:
        positions: of a pass through the network, padding included.
        accumulate: passes a step, and a worker.
        longest: positions of a sample; longer ones are faulty rows, nothing is ever cut.
        pack: fill rows of `longest` positions with several samples each, instead of batching samples of like length.
    """

    positions: int = Field(default=8192, ge=16)
    accumulate: int = Field(default=1, ge=1)
    longest: int = Field(default=4096, ge=16)
    pack: bool = False

    @model_validator(mode="after")
    def _a_sample_fits(self) -> Self:
        if self.positions < self.longest:
            raise ValueError(f"positions={self.positions} have no room for a sample of longest={self.longest}")
        return self


class Optimizer(_Settings):
    """AdamW, with a linear warm-up and a cosine to `final_share` of the learning rate."""

    steps: int = Field(ge=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    final_share: float = Field(default=0.1, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)

    @field_validator("betas")
    @classmethod
    def _shares(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both must be from 0 to below 1")
        return betas


class Loss(_Settings):
    """`text` × text loss + `audio` × weighted mean of the codebooks' losses.

    Attributes:
        codebooks: weight of each codebook; they are divided by their sum. None: equal.
    """

    text: float = Field(default=1.0, ge=0)
    audio: float = Field(default=1.0, ge=0)
    codebooks: tuple[float, ...] | None = None
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    @field_validator("codebooks")
    @classmethod
    def _weights(cls, weights: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if weights is not None and (min(weights, default=0) < 0 or sum(weights) <= 0):
            raise ValueError("weights must not be negative, nor all zero")
        return weights


class Freeze(_Settings):
    """What is not trained: `true`, or for embedding and text head the first row that is.

    Attributes:
        llm: attentions, text FFNs and text norms.
        embed, text_head: all of it, or the rows before an index.
    """

    llm: bool = False
    embed: bool | int = False
    text_head: bool | int = False
    audio_tower: bool = False
    audio_encoder_proj: bool = False


class Checkpoints(_Settings):
    """What is written beside the logs.

    Attributes:
        every: steps between two states that training can go on from.
        keep: the newest so many are kept.
        layouts: of the model at the end.
        dtype: of the model at the end.
    """

    every: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=1)
    layouts: tuple[Literal["original", "transformers"], ...] = ("original",)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Previews(_Settings):
    """Scripts that are spoken while training goes on.

    Attributes:
        every: steps.
        rows: a manifest's rows for the batch job, each spoken as one chunk.
    """

    every: int = Field(ge=1)
    rows: tuple[dict[str, Any], ...] = Field(min_length=1)
    max_frames: int = Field(default=500, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_k: int = Field(default=50, ge=0)
    seed: int = Field(default=0, ge=0)

    @field_validator("rows")
    @classmethod
    def _scripts(cls, rows: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for number, row in enumerate(rows):
            try:
                Script.model_validate({"id": f"row{number}", **row})
            except ValidationError as error:
                raise ValueError(f"{number}: {'; '.join(faults(error))}") from None
        return tuple(
            row | ({"ref_audio": _from_anywhere(row["ref_audio"])} if row.get("ref_audio") else {}) for row in rows
        )


class TrainingSettings(_Settings):
    """One training, whole."""

    output: str
    init: Init
    codec: Place | None = None
    data: Data
    optimizer: Optimizer
    batch: Batch = Batch()
    loss: Loss = Loss()
    freeze: Freeze = Freeze()
    checkpoints: Checkpoints = Checkpoints()
    previews: Previews | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    device: str | None = None
    log_every: int = Field(default=10, ge=1)
    validate_every: int = Field(default=500, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("output")
    @classmethod
    def _shared(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("must be a folder that all workers see, not a URI")
        return str(Path(value).expanduser().absolute())

    @model_validator(mode="after")
    def _previews_are_possible(self) -> Self:
        if self.previews is None:
            return self
        if self.parallel == "fsdp":
            raise ValueError("previews need parallel: ddp; with fsdp no worker has the whole network")
        if self.codec is None and self.init.checkpoint is None:
            raise ValueError("previews need a codec to be heard with")
        return self


def load_settings(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainingSettings:
    """Settings from a YAML file.

    Args:
        overrides: settings of the outermost level that go before the file's.

    Raises:
        BadConfig: the file cannot be read, or a setting is unknown or not possible, all told in one sentence.
    """
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadConfig(f"the settings file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise BadConfig(f"the settings file {str(path)!r} must hold `name: value` lines")
    try:
        return TrainingSettings.model_validate(loaded | dict(overrides or {}))
    except ValidationError as error:
        raise BadConfig(f"the settings file {str(path)!r}: {_sentence(error)}") from error


def _sentence(error: ValidationError) -> str:
    return "; ".join(_fault(fault["type"], fault["loc"], fault["msg"]) for fault in error.errors(include_url=False))


def _fault(kind: str, place: tuple[int | str, ...], message: str) -> str:
    where = ".".join(map(str, place)) or "the whole"
    if kind != "extra_forbidden":
        return f"{where}: {message.removeprefix('Value error, ')}"
    owner: Any = TrainingSettings
    for part in place[:-1]:
        owner = owner.model_fields[part].annotation
        owner = next((one for one in getattr(owner, "__args__", [owner]) if hasattr(one, "model_fields")), owner)
    near = difflib.get_close_matches(str(place[-1]), owner.model_fields, n=1)
    return f"unknown setting {where}" + (f"; did you mean {near[0]}?" if near else "")
