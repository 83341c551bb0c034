"""The settings of a batch job: one field per flag.

Values come from flags, then environment variables (`HIGGS_MAX_BATCH` for `--max-batch`), then a YAML file, then
defaults; pydantic-settings reads all three. The job logs where each value came from. Unknown keys are refused with the
nearest known one. Credentials are not settings: URIs that contain any are refused and not echoed.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from higgs_model import demo
from higgs_model.audio.writers import check_sample_rate
from higgs_model.errors import BadInput
from jobs.runtime.cli import ArgumentParser, print_status

ENV_PREFIX = "HIGGS_"
"""Prefix of the environment variables. The endpoint shares it, and the names that both have mean the same."""
_TYPO_CUTOFF = 0.8
_SECRET = re.compile(r"://([^/?#]*@|[^?]*\?.*(key|secret|token|password|signature|credential)[^=&]*=)", re.IGNORECASE)

SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "ras_win_len", "ras_win_max_num_repeat", "max_frames")
CHUNKING_FIELDS = (
    *("chunk_method", "chunk_max_words", "chunk_max_turns", "context_chunks", "voice_in_system", "spoken_forms"),
)
AUDIO_FIELDS = (
    *("model", "codec", "format", "sample_rate", "loudness_lufs", "true_peak_dbtp", "attempts", "check"),
    *("segment_minutes", "pause_sentence_ms", "pause_paragraph_ms", "pause_turn_ms", "pause_heading_ms"),
)


class JobSettings(BaseModel):
    """The settings of one batch job."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest: str = Field(description="Parquet file or folder, or JSON lines: a path or URI")
    output: str = Field("out", description="folder or s3:// prefix for audio and results")
    model: str = Field("demo", description="demo, a folder, or a Hugging Face Hub repository")
    codec: str | None = Field(None, description="folder or Hub repository of the codec (default: the model's own)")
    voices: str | None = Field(None, description="folder or s3:// prefix of the voice library")
    lexicon: str | None = Field(None, description="pronunciation file: one word<TAB>respelling per line")

    workers: int | None = Field(
        None, ge=1, description="worker actors (default: one per GPU, otherwise one per two CPU cores)"
    )
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs, or share of a GPU, per worker (default: 1 if the cluster has GPUs)"
    )
    max_batch: int | None = Field(
        None, ge=1, description="concurrent requests per worker (default: 192 on a GPU, 16 on a CPU)"
    )

    format: Literal["wav", "flac", "mp3", "opus"] = Field("wav", description="audio format")
    sample_rate: int | None = Field(None, ge=8000, le=192_000, description="in Hz (default: the codec's)")
    loudness_lufs: float | None = Field(None, ge=-60, le=0, description="normalize each recording to this loudness")
    true_peak_dbtp: float | None = Field(None, ge=-40, le=0, description="limit each recording's true peak")
    keep_codes: bool = Field(False, description="store codec codes, so that jobs.render can make other formats later")

    attempts: int = Field(3, ge=1, le=20, description="maximum takes per chunk; the best one is kept")
    check: str | None = Field(
        None, description="module:callable that inspects every take that passes the built-in checks"
    )
    segment_minutes: float | None = Field(
        None,
        gt=0,
        description="split longer scripts at paragraph ends into segments that are synthesized in parallel",
    )
    pause_sentence_ms: int | None = Field(None, ge=0, le=60_000, description="pause between chunks of one paragraph")
    pause_paragraph_ms: int | None = Field(None, ge=0, le=60_000, description="pause after a paragraph")
    pause_turn_ms: int | None = Field(None, ge=0, le=60_000, description="pause after a turn")
    pause_heading_ms: int | None = Field(None, ge=0, le=60_000, description="pause after a heading")
    # Defaults for rows that do not set these columns.
    seed: int = Field(0, ge=0, lt=2**63, description="default seed of a row")
    temperature: float | None = Field(None, description="default sampling temperature of a row")
    top_k: int | None = Field(None, description="default top-k of a row")
    top_p: float | None = Field(None, description="default top-p of a row")
    ras_win_len: int | None = Field(None, description="default window of repetition-aware sampling, in frames")
    ras_win_max_num_repeat: int | None = Field(None, description="default maximum of repetitions in that window")
    max_frames: int | None = Field(None, description="default maximum of frames per chunk (25 per second)")
    chunk_method: str | None = Field(
        None, description="default chunk method of a row: auto, sentence, word, speaker, or none"
    )
    chunk_max_words: int | None = Field(None, description="default maximum of words per chunk")
    chunk_max_turns: int | None = Field(None, description="default maximum of turns per chunk")
    context_chunks: int | None = Field(None, description="default number of preceding chunks in a prompt")
    voice_in_system: bool | None = Field(None, description="put reference recordings into the system message")
    spoken_forms: bool | None = Field(None, description="write out numbers, dates and abbreviations before synthesis")

    max_failed: str = Field(
        "0",
        pattern=r"^\d+(\.\d+)?%?$",
        description="rows that may fail, such as 10 or 0.5%; with more, the job ends with exit status 3",
    )
    limit: int | None = Field(None, ge=1, description="process only the first N rows of the manifest")
    overwrite: bool = Field(False, description="delete earlier results and synthesize every row again")
    dry_run: bool = Field(False, description="print each script's prompts as JSON lines; load no model")
    grace_s: float = Field(60.0, ge=0, description="seconds for running rows to finish after SIGTERM")

    @field_validator("max_failed", mode="before")
    @classmethod
    def _number_to_text(cls, value: object) -> object:
        """YAML reads `10` and `0.01` as numbers."""
        return str(value) if isinstance(value, int | float) else value

    @field_validator("manifest", "output", "voices", "lexicon")
    @classmethod
    def _absolute_path(cls, value: str | None) -> str | None:
        """Workers run in directories of their own, so relative paths would mean something else there."""
        return value if value is None or "://" in value else str(Path(value).expanduser().absolute())

    @field_validator("manifest", "output", "voices", "lexicon", "model", "codec")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        """Settings are logged and stored with the results."""
        if value is not None and _SECRET.search(value):
            raise ValueError(
                f"credentials do not belong in a URI ({value.partition('://')[0]}://…); "
                "use AWS_ACCESS_KEY_ID and related variables, or a role"
            )
        return value

    @model_validator(mode="after")
    def _check_sample_rate(self) -> Self:
        if self.sample_rate is not None:
            check_sample_rate(self.format, self.sample_rate)
        return self

    def audio_settings(self) -> dict[str, Any]:
        """Return the settings that affect a row's audio; they are part of `script_sha256`."""
        settings = {name: getattr(self, name) for name in AUDIO_FIELDS}
        return settings | ({"model": f"{demo.NAME}@{demo.version()}"} if self.model == demo.NAME else {})

    def row_defaults(self) -> dict[str, Any]:
        """Return the sampling and chunking defaults for rows that do not set them."""
        values = {name: getattr(self, name) for name in (*SAMPLING_FIELDS, *CHUNKING_FIELDS)}
        return {name: value for name, value in values.items() if value is not None}

    def allowed_failures(self, rows: int) -> int:
        """Return how many of `rows` rows may fail."""
        if self.max_failed.endswith("%"):
            return int(float(self.max_failed[:-1]) / 100 * rows)
        share = float(self.max_failed)
        return int(share * rows) if "." in self.max_failed else int(share)


class _SettingsSources(JobSettings, BaseSettings):
    """The same fields as pydantic-settings reads them, and the name of the YAML file."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    config: str | None = Field(None, description="YAML file with any of these settings")


def parse_settings(arguments: Sequence[str]) -> JobSettings:
    """Return the settings of a command line; see `resolve_settings`."""
    return resolve_settings(arguments)[0]


def resolve_settings(arguments: Sequence[str]) -> tuple[JobSettings, dict[str, str]]:
    """Resolve settings from flags, the environment and the file that `--config` names.

    Returns:
        The settings, and where each value that is not a default came from: `flags`, `environment` or the file's path.

    Raises:
        BadInput: a setting is unknown or invalid; the message is one sentence.
    """
    flags = _read_flags(arguments)
    file = flags.pop("config", None)
    by_source = {
        file or "": _read_file(file) if file else {},
        "environment": _read_environment(),
        "flags": flags,
    }
    values = {name: value for found in by_source.values() for name, value in found.items()}
    sources = {name: source for source, found in by_source.items() for name in found}
    if "manifest" not in values:
        raise BadInput("no manifest; pass --manifest PATH_OR_URI")
    try:
        return JobSettings.model_validate(values), sources
    except ValidationError as error:
        raise BadInput(_describe_errors(error, sources)) from error


def describe_sources(settings: JobSettings, sources: Mapping[str, str]) -> str:
    """Return one log line with every value that is not a default, grouped by source."""
    by_source: dict[str, list[str]] = {}
    for name, source in sources.items():
        by_source.setdefault(source, []).append(f"{name}={getattr(settings, name)}")
    groups = (f"{', '.join(sorted(values))} ({source})" for source, values in sorted(by_source.items()))
    return f"settings: {'; '.join(groups)}"


def _read_flags(arguments: Sequence[str]) -> dict[str, Any]:
    parser = ArgumentParser(
        prog="python -m jobs.synthesize",
        description="Synthesize every script in a manifest.",
        epilog=f"Any option may also be an environment variable such as {ENV_PREFIX}MAX_BATCH. Flags take precedence "
        "over the environment, and the environment over the file.",
    )
    source: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
        _SettingsSources,
        root_parser=parser,
        cli_parse_args=list(arguments),
        cli_avoid_json=True,
        cli_enforce_required=False,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        cli_kebab_case=True,
        formatter_class=argparse.HelpFormatter,
        add_argument_method=_add_argument,
    )
    return source()


def _add_argument(group: Any, *names: str, **options: Any) -> Any:
    """Add a flag without the words "(default: None)" in its help."""
    options["help"] = options.get("help", "").removesuffix("(default: None)").removesuffix("(required)").strip()
    return group.add_argument(*names, **options)


def _read_environment() -> dict[str, Any]:
    known = JobSettings.model_fields
    for variable in os.environ:
        name = variable.removeprefix(ENV_PREFIX).lower()
        if not variable.startswith(ENV_PREFIX) or name in known:
            continue
        # The variable may be one of the endpoint's, so only a likely typo is reported.
        if near := difflib.get_close_matches(name, known, 1, _TYPO_CUTOFF):
            print_status(f"unknown environment variable {variable}; did you mean {ENV_PREFIX}{near[0].upper()}?")
    found = EnvSettingsSource(_SettingsSources, env_prefix=ENV_PREFIX)()
    return {name: value for name, value in found.items() if name in known}


def _read_file(path: str) -> dict[str, Any]:
    try:
        Path(path).open(encoding="utf-8").close()
        settings = YamlConfigSettingsSource(_SettingsSources, path)()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"settings file {path!r} cannot be read: {error}") from error
    except (ValueError, TypeError) as error:
        raise BadInput(f"settings file {path!r} must contain `name: value` lines") from error
    settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
    for name in settings:
        if name not in JobSettings.model_fields:
            near = difflib.get_close_matches(name, JobSettings.model_fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise BadInput(f"settings file {path!r}: unknown setting {name!r}{hint}")
    return settings


def _describe_errors(error: ValidationError, sources: Mapping[str, str]) -> str:
    problems = []
    for detail in error.errors():
        name = ".".join(map(str, detail["loc"]))
        source = sources.get(name, "flags")
        shown = f"{ENV_PREFIX}{name.upper()}" if source == "environment" else f"--{name.replace('_', '-')}"
        where = "" if source in ("flags", "environment") else f" in {source}"
        # Our own checks (`value_error`) word their messages themselves, and some must not echo the value.
        got = "" if detail["type"] == "value_error" else f", got {detail['input']!r}"
        problems.append(f"{shown}{where}: {detail['msg']}{got}")
    return "; ".join(problems)
