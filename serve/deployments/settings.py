"""Settings of the endpoint: one field per setting.

Values come from `serve run serve.app:app NAME=VALUE` or the `args` of a Serve config file, then from environment
variables (`HIGGS_MODEL`), then defaults. An unknown argument is refused with the nearest known one. API keys are never
arguments, because dashboards show those: they are in `HIGGS_API_KEYS` or in a file.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from higgs_model.errors import BadConfig

logger = logging.getLogger(__name__)

ENV_PREFIX = "HIGGS_"
KEYS_VARIABLE = "HIGGS_API_KEYS"
_MIB = 1 << 20


class EndpointSettings(BaseModel):
    """Settings of the endpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("demo", min_length=1, description="demo, a folder, or a Hugging Face Hub repository")
    codec: str | None = Field(None, description="folder or Hub repository of the codec (default: the model's own)")
    voices: str | None = Field(None, description="folder or s3:// prefix of the voice library; uploads go there too")
    default_voice: str | None = Field(
        None, description="voice for speech requests without one, or with one of OpenAI's"
    )
    voice_aliases: Annotated[dict[str, str], NoDecode] = Field(
        {}, description="alternative voice names: alloy=belinda,echo=bob"
    )

    seed: int = Field(0, ge=0, lt=2**63, description="default seed of a request")
    attempts: int = Field(
        3, ge=1, le=20, description="maximum takes per chunk for requests that are not live; the best one is used"
    )

    min_replicas: int = Field(1, ge=1, description="synthesizer replicas that always run")
    max_replicas: int = Field(1, ge=1, description="synthesizer replicas under load")
    upscale_delay_s: float = Field(30.0, ge=0, description="seconds of load before a replica is added")
    downscale_delay_s: float = Field(600.0, ge=0, description="seconds without load before a replica is removed")
    gpus_per_replica: float | None = Field(
        None, ge=0, description="GPUs, or share of a GPU, per replica (default: 1 if the cluster has GPUs)"
    )
    cpus_per_replica: float = Field(1.0, ge=0, description="logical CPUs that Ray reserves per replica")
    max_batch: int = Field(16, ge=1, le=1024, description="concurrent requests per replica")
    max_queued: int = Field(
        32, ge=0, le=100_000, description="queued requests per ingress replica; further ones are rejected with 429"
    )
    ingress_replicas: int = Field(1, ge=1, description="ingress replicas, each with its own queue")

    max_input_chars: int = Field(4096, ge=1, description="maximum length of text in /v1/audio/speech")
    max_script_chars: int = Field(200_000, ge=1, description="maximum length of text in /v1/audio/scripts")
    max_body_bytes: int = Field(24 * _MIB, ge=1024, description="maximum size of a request body")
    max_reference_bytes: int = Field(10 * _MIB, ge=1024, description="maximum size of a reference recording")
    max_reference_s: float = Field(60.0, gt=0, le=300, description="maximum duration of a reference recording")
    request_timeout_s: float = Field(900.0, gt=0, description="seconds from a request's arrival to its last byte")
    reference_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="comma-separated https:// prefixes from which ref_audio may be downloaded (default: none)"
    )
    api_keys_file: str | None = Field(
        None, description="file with one API key per line; HIGGS_API_KEYS has them separated by commas"
    )

    @field_validator("voice_aliases", mode="before")
    @classmethod
    def _parse_pairs(cls, value: object) -> object:
        """Accept `name=voice,…` as well as a mapping."""
        if not isinstance(value, str):
            return value
        pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
        return {name.strip(): voice.strip() for name, _, voice in pairs}

    @field_validator("reference_urls", mode="before")
    @classmethod
    def _parse_list(cls, value: object) -> object:
        """Accept comma-separated text as well as a list."""
        return tuple(item.strip() for item in value.split(",") if item.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_consistency(self) -> EndpointSettings:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}")
        for prefix in self.reference_urls:
            if not prefix.startswith("https://") or prefix.count("/") < 3:
                raise ValueError(
                    f"reference_urls: {prefix!r} is not a prefix such as https://voices.example.org/public/"
                )
        return self


class _EnvironmentSettings(EndpointSettings, BaseSettings):
    """The same fields as pydantic-settings reads them."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)


def resolve_config(arguments: Mapping[str, Any]) -> EndpointSettings:
    """Resolve the settings from Serve's arguments and the environment.

    Raises:
        BadConfig: a setting is unknown or invalid; the message is one sentence.
    """
    known = EndpointSettings.model_fields
    for name in arguments:
        if name not in known:
            raise BadConfig(f"unknown endpoint setting {name!r}{_nearest(name)}")
    for variable in os.environ:
        name = variable.removeprefix(ENV_PREFIX).lower()
        if variable.startswith(ENV_PREFIX) and variable != KEYS_VARIABLE and name not in known:
            logger.warning("unknown environment variable %s%s", variable, _nearest(name))
    environment = EnvSettingsSource(_EnvironmentSettings, env_prefix=ENV_PREFIX)()
    try:
        return EndpointSettings.model_validate({k: v for k, v in environment.items() if k in known} | dict(arguments))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc'])) or 'settings'}: {item['msg']}" for item in error.errors()]
        raise BadConfig(f"invalid endpoint settings: {'; '.join(problems)}") from None


def key_digests(config: EndpointSettings) -> frozenset[bytes]:
    """Return the SHA-256 digests of all API keys; without any, no key is required.

    Raises:
        BadConfig: the key file cannot be read, or is empty.
    """
    keys = os.environ.get(KEYS_VARIABLE, "").split(",")
    if config.api_keys_file is not None:
        try:
            lines = Path(config.api_keys_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadConfig(f"api_keys_file: {config.api_keys_file!r} cannot be read: {error}") from error
        found = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            # An empty secret must not disable authentication.
            raise BadConfig(f"api_keys_file: {config.api_keys_file!r} contains no key")
        keys += found
    return frozenset(hashlib.sha256(key.strip().encode()).digest() for key in keys if key.strip())


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, EndpointSettings.model_fields, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
