"""Everything that a job can be told: one field a flag, each with its meaning.

Flags go before the environment (`HIGGS_MAX_BATCH` for `--max-batch`), the environment before a YAML file, the file
before defaults; where each value came from is said when a job begins. An unknown key of the file is refused with the
nearest known one. Secrets are no settings: URIs that hold some are refused, and not repeated.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from higgs_model import demo
from higgs_model.audio.writers import check_rate
from higgs_model.errors import BadInput
from jobs.runtime.cli import Arguments, say

PREFIX = "HIGGS_"
"""Of variables: the endpoint reads its settings from such too, and they mean the same."""
_LIKELY_A_TYPO = 0.8
_SECRET = re.compile(r"://([^/?#]*@|[^?]*\?.*(key|secret|token|password|signature|credential)[^=&]*=)", re.IGNORECASE)

SAMPLING = ("temperature", "top_k", "top_p", "ras_win_len", "ras_win_max_num_repeat", "max_frames")
CHUNKING = ("chunk_method", "chunk_max_words", "chunk_max_turns", "context_chunks", "voice_in_system", "spoken_forms")
HEARD = (
    *("model", "codec", "format", "sample_rate", "loudness_lufs", "true_peak_dbtp", "attempts", "check"),
    *("segment_minutes", "pause_sentence_ms", "pause_paragraph_ms", "pause_turn_ms", "pause_heading_ms"),
)


class JobSettings(BaseModel):
    """The settings of one batch job."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest: str = Field(description="Parquet file or folder, or JSON lines: a path or URI")
    output: str = Field("out", description="folder or s3:// prefix of the results")
    model: str = Field("demo", description="demo, a folder, or a repository on the hub")
    codec: str | None = Field(None, description="folder or repository of the codec; by default the model's own")
    voices: str | None = Field(None, description="folder or prefix of the voice library")
    lexicon: str | None = Field(None, description="file of pronunciations, a word and its respelling a line")

    workers: int | None = Field(None, ge=1, description="actors; by default one a GPU, else one per two CPU cores")
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPU share of an actor; by default 1 where there are any"
    )
    max_batch: int | None = Field(None, ge=1, description="requests that an engine runs at the same time")

    format: Literal["wav", "flac", "mp3", "opus"] = Field("wav", description="of the audio files")
    sample_rate: int | None = Field(None, ge=8000, le=192_000, description="of the audio files; by default the codec's")
    loudness_lufs: float | None = Field(None, ge=-60, le=0, description="bring each recording to this loudness")
    true_peak_dbtp: float | None = Field(None, ge=-40, le=0, description="keep each recording's true peak below this")
    keep_codes: bool = Field(False, description="keep the codec codes of every recording, to make other formats later")

    attempts: int = Field(3, ge=1, le=20, description="takes of a chunk before the best one is kept")
    check: str | None = Field(
        None, description="module:callable that listens to every good take and says what is wrong with it"
    )
    segment_minutes: float | None = Field(
        None, gt=0, description="cut longer scripts, at ends of paragraphs, into segments that are spoken side by side"
    )
    pause_sentence_ms: int | None = Field(None, ge=0, le=60_000, description="pause after a chunk inside a paragraph")
    pause_paragraph_ms: int | None = Field(None, ge=0, le=60_000, description="pause after a paragraph")
    pause_turn_ms: int | None = Field(None, ge=0, le=60_000, description="pause after a turn")
    pause_heading_ms: int | None = Field(None, ge=0, le=60_000, description="pause after a heading")
    seed: int = Field(0, ge=0, lt=2**63, description="of rows that give none")
    temperature: float | None = Field(None, description="of rows that give none; so are the following")
    top_k: int | None = None
    top_p: float | None = None
    ras_win_len: int | None = None
    ras_win_max_num_repeat: int | None = None
    max_frames: int | None = None
    chunk_method: str | None = None
    chunk_max_words: int | None = None
    chunk_max_turns: int | None = None
    context_chunks: int | None = None
    voice_in_system: bool | None = None
    spoken_forms: bool | None = Field(None, description="write numbers, dates and abbreviations out before speaking")

    max_failed: str = Field("0", pattern=r"^\d+(\.\d+)?%?$", description="failed rows that are allowed: 10, or 0.5%%")
    limit: int | None = Field(None, ge=1, description="only the first rows")
    overwrite: bool = Field(False, description="forget earlier results")
    dry_run: bool = Field(False, description="print what would be sent to the model, one JSON line a script")
    grace_s: float = Field(
        60.0, ge=0, description="seconds that rows under way have to end when the job is told to stop"
    )

    @field_validator("manifest", "output", "voices", "lexicon")
    @classmethod
    def _from_anywhere(cls, value: str | None) -> str | None:
        """Paths mean the same to workers, which run in folders of their own."""
        return value if value is None or "://" in value else str(Path(value).expanduser().absolute())

    @field_validator("manifest", "output", "voices", "lexicon", "model", "codec")
    @classmethod
    def _without_secrets(cls, value: str | None) -> str | None:
        """Settings are printed, and kept beside the results."""
        if value is not None and _SECRET.search(value):
            raise ValueError(
                f"credentials do not belong in a URI ({value.partition('://')[0]}://…); "
                "AWS_ACCESS_KEY_ID and its like, or a role, hold them"
            )
        return value

    @model_validator(mode="after")
    def _format_holds_the_rate(self) -> Self:
        if self.sample_rate is not None:
            check_rate(self.format, self.sample_rate)
        return self

    def heard(self) -> dict[str, Any]:
        """What changes the audio of a row beyond what the row says itself."""
        told = {name: getattr(self, name) for name in HEARD}
        return told | ({"model": f"{demo.NAME}@{demo.version()}"} if self.model == demo.NAME else {})

    def row_defaults(self) -> dict[str, Any]:
        """What rows get that say nothing of it themselves."""
        given = {name: getattr(self, name) for name in (*SAMPLING, *CHUNKING)}
        return {name: value for name, value in given.items() if value is not None}

    def allowed_failures(self, rows: int) -> int:
        """How many rows of so many may fail."""
        if self.max_failed.endswith("%"):
            return int(float(self.max_failed[:-1]) / 100 * rows)
        share = float(self.max_failed)
        return int(share * rows) if "." in self.max_failed else int(share)


def parse(arguments: Sequence[str]) -> JobSettings:
    """Settings from a command line and the environment.

    Raises:
        BadInput: a setting is unknown or not possible, in one sentence.
    """
    return gather(arguments, os.environ)[0]


def gather(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[JobSettings, dict[str, str]]:
    """Settings, and of each that is no default where it came from: `flags`, `environment`, or the file's name.

    Raises:
        BadInput: a setting is unknown or not possible, in one sentence.
    """
    flags = {name: value for name, value in vars(_parser().parse_args(arguments)).items() if value is not None}
    file = flags.pop("config", None)
    places = {
        file or "": _from_file(file) if file else {},
        "environment": _from_environment(environment),
        "flags": flags,
    }
    values = {name: value for found in places.values() for name, value in found.items()}
    sources = {name: place for place, found in places.items() for name in found}
    if "manifest" not in values:
        raise BadInput("no manifest is given; say --manifest PATH_OR_URI")
    try:
        return JobSettings.model_validate(values), sources
    except ValidationError as error:
        raise BadInput(_sentence(error, sources)) from error


def told(settings: JobSettings, sources: Mapping[str, str]) -> str:
    """A line that says what was set, and where."""
    places: dict[str, list[str]] = {}
    for name, place in sources.items():
        places.setdefault(place, []).append(f"{name}={getattr(settings, name)}")
    return "settings: " + "; ".join(f"{', '.join(sorted(found))} ({place})" for place, found in sorted(places.items()))


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="python -m jobs.synthesize", description="Make the audio of every script in a manifest.")
    for name, field in JobSettings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        kind = _plain_type(field.annotation)
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=field.description)
        else:
            choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
            parser.add_argument(
                flag, metavar=None if choices else name.upper(), choices=choices, help=field.description
            )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings")
    parser.epilog = f"Any setting may also be a variable such as {PREFIX}MAX_BATCH: flags go first, then variables."
    return parser


def _plain_type(annotation: Any) -> Any:
    """The type of a setting that may also be absent."""
    if isinstance(annotation, types.UnionType):
        return next(one for one in typing.get_args(annotation) if one is not type(None))
    return annotation


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    known, found = JobSettings.model_fields, {}
    for variable, value in environment.items():
        name = variable.removeprefix(PREFIX).lower()
        if variable.startswith(PREFIX) and name in known:
            found[name] = value
        elif variable.startswith(PREFIX) and (near := difflib.get_close_matches(name, known, 1, _LIKELY_A_TYPO)):
            # Others may be the endpoint's.
            say(f"the environment has {variable}, which is no setting; did you mean {PREFIX}{near[0].upper()}?")
    return found


def _from_file(path: str) -> dict[str, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"the settings file {path!r} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise BadInput(f"the settings file {path!r} must hold `name: value` lines")
    settings = {str(name).replace("-", "_"): value for name, value in loaded.items()}
    for name in settings:
        if name not in JobSettings.model_fields:
            near = difflib.get_close_matches(name, JobSettings.model_fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise BadInput(f"the settings file {path!r} has the unknown setting {name!r}{hint}")
    return settings | ({"max_failed": str(settings["max_failed"])} if "max_failed" in settings else {})


def _sentence(error: ValidationError, sources: Mapping[str, str]) -> str:
    faults = []
    for one in error.errors():
        name = ".".join(map(str, one["loc"]))
        place = sources.get(name, "flags")
        shown = f"{PREFIX}{name.upper()}" if place == "environment" else f"--{name.replace('_', '-')}"
        faults.append(f"{shown}{f' in {place}' if place not in ('flags', 'environment') else ''}: {one['msg']}")
    return "; ".join(faults)
