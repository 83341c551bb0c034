"""Settings of a training run, read from YAML.

    init: model · data: manifests · batch, optimizer, loss, freeze: training · the rest: outputs and hardware

Training from scratch and fine-tuning differ in `init` only. Unknown keys are rejected with the closest valid key, and
all errors are reported at once with their paths.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from higgs_model import demo
from higgs_model.errors import BadConfig
from higgs_model.script.script import Script, error_messages


def _absolute_path(value: str) -> str:
    """Make a local path absolute, because workers run in other folders; the demo's name, hub ids and URIs are kept."""
    path = Path(value).expanduser()
    return str(path.absolute()) if value != demo.NAME and "://" not in value and path.exists() else value


Location = Annotated[str, AfterValidator(_absolute_path)]
"""A path, a URI or a hub id."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class InitSettings(_Settings):
    """The model to train: a checkpoint, or a configuration to train from scratch.

    Attributes:
        checkpoint: `demo`, a folder or a hub id, in either layout.
        config: path or content of a `config.json`; missing special token ids and vocabulary size are taken from the
            tokenizer.
        tokenizer: folder or hub id; default: the checkpoint's own.
        revision: branch, tag or commit of the checkpoint on the hub.
    """

    checkpoint: Location | None = None
    config: Location | dict[str, Any] | None = None
    tokenizer: Location | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _validate_source(self) -> Self:
        if (self.checkpoint is None) == (self.config is None):
            raise ValueError("set either checkpoint (fine-tuning) or config (training from scratch)")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("config requires tokenizer, a folder or a hub id")
        return self


class DataSettings(_Settings):
    """Training and validation data; see `samples` for the columns of a row.

    Attributes:
        manifest, validation: JSON lines or Parquet, by path or URI.
        voices: voice library for rows with a `voice`.
        reference: fraction of the samples of rows with a `speaker` that start with another recording of that speaker,
            as in voice cloning; sampled anew in each epoch.
        turns: maximum number of rows of a speaker that form consecutive turns of a sample, like the chunks of a long
            script; the number is sampled.
        bad_rows: maximum number of invalid rows, which are skipped; with more, the run fails before training.
    """

    manifest: Location
    validation: Location | None = None
    voices: Location | None = None
    reference: float = Field(default=0.5, ge=0, le=1)
    turns: int = Field(default=1, ge=1, le=64)
    bad_rows: int = Field(default=0, ge=0)


class BatchSettings(_Settings):
    """Size of the batches.

    Attributes:
        positions: maximum number of positions per forward pass, padding included.
        accumulate: gradient accumulation: forward passes per step and worker.
        longest: maximum number of positions per sample; longer ones are invalid rows, samples are never truncated.
        pack: pack several samples into rows of `longest` positions instead of batching samples of similar length.
    """

    positions: int = Field(default=8192, ge=16)
    accumulate: int = Field(default=1, ge=1)
    longest: int = Field(default=4096, ge=16)
    pack: bool = False

    @model_validator(mode="after")
    def _validate_sizes(self) -> Self:
        if self.positions < self.longest:
            raise ValueError(f"positions={self.positions} is less than longest={self.longest}, a single sample")
        return self


class OptimizerSettings(_Settings):
    """AdamW with linear warm-up and cosine decay to the fraction `final_share` of the learning rate."""

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
    def _validate_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both must be at least 0 and below 1")
        return betas


class LossSettings(_Settings):
    """Loss: `text` × text loss + `audio` × weighted mean of the codebook losses.

    Attributes:
        codebooks: weight of each codebook, normalized to a sum of 1; None: equal weights.
    """

    text: float = Field(default=1.0, ge=0)
    audio: float = Field(default=1.0, ge=0)
    codebooks: tuple[float, ...] | None = None
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    @field_validator("codebooks")
    @classmethod
    def _validate_weights(cls, weights: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if weights is not None and (min(weights, default=0) < 0 or sum(weights) <= 0):
            raise ValueError("weights must not be negative or all zero")
        return weights


class FreezeSettings(_Settings):
    """Frozen parts of the model.

    Attributes:
        llm: attention, text FFNs and text norms.
        embed, text_head: `true`: all rows; a number: the rows below it.
    """

    llm: bool = False
    embed: bool | int = False
    text_head: bool | int = False
    audio_tower: bool = False
    audio_encoder_proj: bool = False


class CheckpointSettings(_Settings):
    """Checkpoints for resuming, and the final model.

    Attributes:
        every: steps between checkpoints.
        keep: number of most recent checkpoints to keep.
        layouts: layouts of the final model.
        dtype: dtype of the final model.
    """

    every: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=1)
    layouts: tuple[Literal["original", "transformers"], ...] = ("original",)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class PreviewSettings(_Settings):
    """Scripts to synthesize during training.

    Attributes:
        every: steps between previews.
        rows: manifest rows of the batch job, each synthesized as a single chunk.
    """

    every: int = Field(ge=1)
    rows: tuple[dict[str, Any], ...] = Field(min_length=1)
    max_frames: int = Field(default=500, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_k: int = Field(default=50, ge=0)
    seed: int = Field(default=0, ge=0)

    @field_validator("rows")
    @classmethod
    def _validate_rows(cls, rows: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for number, row in enumerate(rows):
            try:
                Script.model_validate({"id": f"row{number}", **row})
            except ValidationError as error:
                raise ValueError(f"{number}: {'; '.join(error_messages(error))}") from None
        return tuple(
            row | ({"ref_audio": _absolute_path(row["ref_audio"])} if row.get("ref_audio") else {}) for row in rows
        )


class TrainingSettings(_Settings):
    """All settings of a training run."""

    output: str
    init: InitSettings
    codec: Location | None = None
    data: DataSettings
    optimizer: OptimizerSettings
    batch: BatchSettings = BatchSettings()
    loss: LossSettings = LossSettings()
    freeze: FreezeSettings = FreezeSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    previews: PreviewSettings | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    device: str | None = None
    log_every: int = Field(default=10, ge=1)
    validate_every: int = Field(default=500, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("output")
    @classmethod
    def _validate_output(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("must be a folder shared by all workers, not a URI")
        return str(Path(value).expanduser().absolute())

    @model_validator(mode="after")
    def _validate_previews(self) -> Self:
        if self.previews is None:
            return self
        if self.parallel == "fsdp":
            raise ValueError("previews require parallel: ddp; with fsdp no worker has the full model")
        if self.codec is None and self.init.checkpoint is None:
            raise ValueError("previews require codec")
        return self


def load_settings(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainingSettings:
    """Load settings from a YAML file.

    Args:
        path: the file.
        overrides: top-level settings that take precedence over the file's.

    Raises:
        BadConfig: the file cannot be read, or settings are unknown or invalid; the message lists all errors.
    """
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadConfig(f"the settings file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise BadConfig(f"the settings file {str(path)!r} must be a YAML mapping")
    try:
        return TrainingSettings.model_validate(loaded | dict(overrides or {}))
    except ValidationError as error:
        raise BadConfig(f"the settings file {str(path)!r}: {_format_errors(error)}") from error


def _format_errors(error: ValidationError) -> str:
    return "; ".join(
        _format_error(detail["type"], detail["loc"], detail["msg"]) for detail in error.errors(include_url=False)
    )


def _format_error(kind: str, loc: tuple[int | str, ...], message: str) -> str:
    path = ".".join(map(str, loc)) or "settings"
    if kind != "extra_forbidden":
        return f"{path}: {message.removeprefix('Value error, ')}"
    owner: Any = TrainingSettings
    for part in loc[:-1]:
        owner = owner.model_fields[part].annotation
        options = getattr(owner, "__args__", [owner])
        owner = next((option for option in options if hasattr(option, "model_fields")), owner)
    near = difflib.get_close_matches(str(loc[-1]), owner.model_fields, n=1)
    return f"unknown setting {path}" + (f"; did you mean {near[0]}?" if near else "")
