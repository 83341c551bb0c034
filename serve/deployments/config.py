"""Everything that the endpoint can be told: one field a setting, from `serve run serve.app:app NAME=VALUE`, from the
`args` of a Serve config file, or from the environment as `HIGGS_NAME`.

Arguments go before the environment, the environment before defaults. An unknown argument is refused with the nearest
known one. API keys are never arguments, since dashboards show those: they are in `HIGGS_API_KEYS` or in a file.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from higgs_model.errors import BadConfig

logger = logging.getLogger(__name__)

KEYS_VARIABLE = "HIGGS_API_KEYS"
_PREFIX = "HIGGS_"
_MIB = 1 << 20


class EndpointConfig(BaseModel):
    """The settings of one endpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("demo", min_length=1, description="demo, a folder, or a repository on the hub")
    codec: str | None = Field(None, description="folder or repository of the codec; by default the model's own")
    voices: str | None = Field(None, description="folder or s3:// prefix of the voice library; uploads go there too")
    default_voice: str | None = Field(None, description="voice of requests that name none, or one of OpenAI's")
    voice_aliases: dict[str, str] = Field({}, description="other names of voices: alloy=belinda,echo=bob")

    seed: int = Field(0, ge=0, lt=2**63, description="of requests that give none")
    attempts: int = Field(3, ge=1, le=20, description="takes of a chunk before the best is kept, where not live")

    min_replicas: int = Field(1, ge=1, description="synthesizers that are always there")
    max_replicas: int = Field(1, ge=1, description="synthesizers under load")
    upscale_delay_s: float = Field(30.0, ge=0, description="how long load lasts before another synthesizer is started")
    downscale_delay_s: float = Field(600.0, ge=0, description="how long one is not needed before it is stopped")
    gpus_per_replica: float | None = Field(None, ge=0, description="share of a GPU; by default 1 where there are any")
    cpus_per_replica: float = Field(1.0, ge=0, description="of a synthesizer, as Ray counts them")
    max_batch: int = Field(16, ge=1, le=1024, description="requests that a synthesizer speaks at the same time")
    max_queued: int = Field(
        32, ge=0, le=100_000, description="requests that may wait; further ones are told to come again"
    )
    ingress_replicas: int = Field(1, ge=1, description="HTTP workers; each has a queue of its own")

    max_input_chars: int = Field(4096, ge=1, description="text of /v1/audio/speech")
    max_script_chars: int = Field(200_000, ge=1, description="text of /v1/audio/scripts")
    max_body_bytes: int = Field(24 * _MIB, ge=1024, description="of a request")
    max_reference_bytes: int = Field(10 * _MIB, ge=1024, description="of a reference recording")
    max_reference_s: float = Field(60.0, gt=0, le=300, description="length of a reference recording")
    request_timeout_s: float = Field(900.0, gt=0, description="from a request's arrival to its last byte")
    reference_urls: tuple[str, ...] = Field(
        (), description="https:// prefixes under which ref_audio may be a URL, with commas; none by default"
    )
    api_keys_file: str | None = Field(
        None, description="file with an API key a line; HIGGS_API_KEYS has them with commas"
    )

    @field_validator("voice_aliases", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        """A map may also come as text."""
        if not isinstance(value, str):
            return value
        pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
        return {name.strip(): voice.strip() for name, _, voice in pairs}

    @field_validator("reference_urls", mode="before")
    @classmethod
    def _items(cls, value: object) -> object:
        """A list may also come as text."""
        return tuple(one.strip() for one in value.split(",") if one.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _together(self) -> EndpointConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}")
        for prefix in self.reference_urls:
            if not prefix.startswith("https://") or prefix.count("/") < 3:
                raise ValueError(f"reference_urls: {prefix!r} is no prefix such as https://voices.example.org/public/")
        return self


def parse(arguments: Mapping[str, Any], environment: Mapping[str, str]) -> EndpointConfig:
    """Settings from Serve's arguments and the environment.

    Raises:
        BadConfig: a setting is unknown or not possible, in one sentence.
    """
    known = EndpointConfig.model_fields
    for name in arguments:
        if name not in known:
            raise BadConfig(f"the endpoint has no setting {name!r}{_nearest(name)}")
    given = {}
    for variable, value in environment.items():
        name = variable.removeprefix(_PREFIX).lower()
        if not variable.startswith(_PREFIX) or variable == KEYS_VARIABLE:
            continue
        if name in known:
            given[name] = value
        else:
            logger.warning("the environment has %s, which is no setting of the endpoint%s", variable, _nearest(name))
    try:
        return EndpointConfig.model_validate(given | dict(arguments))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc'])) or 'together'}: {one['msg']}" for one in error.errors()]
        raise BadConfig(f"the endpoint's settings: {'; '.join(faults)}") from None


def key_digests(config: EndpointConfig, environment: Mapping[str, str]) -> frozenset[bytes]:
    """SHA-256 of all API keys; none: nobody needs one.

    Raises:
        BadConfig: the file of keys cannot be read, or has none.
    """
    keys = environment.get(KEYS_VARIABLE, "").split(",")
    if config.api_keys_file is not None:
        try:
            lines = Path(config.api_keys_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadConfig(f"api_keys_file: {config.api_keys_file!r} cannot be read: {error}") from error
        found = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            # An empty secret must not open the door.
            raise BadConfig(f"api_keys_file: {config.api_keys_file!r} has no key in it")
        keys += found
    return frozenset(hashlib.sha256(key.strip().encode()).digest() for key in keys if key.strip())


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, EndpointConfig.model_fields, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
