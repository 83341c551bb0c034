"""Request bodies: OpenAI's speech fields with our extensions, and delivery options.

Unknown fields are ignored, as OpenAI's clients expect; known ones are honoured or refused, never silently changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from higgs_model.audio.speed import MAX_SPEED, MIN_SPEED
from higgs_model.audio.streams import StreamFormat
from higgs_model.script.script import Script, faults
from serve.http.errors import BadRequest

OPENAI_VOICES = (
    *("alloy", "ash", "ballad", "coral", "echo", "fable", "onyx", "nova", "sage", "shimmer", "verse", "marin", "cedar"),
)
_SCRIPT_FIELDS = (
    *("scene", "ref_text", "language", "spoken_forms", "voice_in_system", "seed", "temperature", "top_k", "top_p"),
    *("ras_win_len", "ras_win_max_num_repeat", "max_frames", "chunk_method", "chunk_max_words", "context_chunks"),
)


def _voice_name(value: object) -> object:
    """Accept `{"id": NAME}` as well as a name."""
    return value["id"] if isinstance(value, dict) and "id" in value else value


class Delivery(BaseModel):
    """How audio is delivered.

    Attributes:
        live: stream samples while they are generated; otherwise stream each chunk once it has passed its checks.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    response_format: StreamFormat = "mp3"
    speed: float = Field(default=1.0, ge=MIN_SPEED, le=MAX_SPEED, allow_inf_nan=False)
    stream_format: Literal["audio", "sse"] = "audio"
    live: bool = True


class SpeechRequest(Delivery):
    """`POST /v1/audio/speech`."""

    input: str = Field(min_length=1, description="the text to synthesize")
    model: str | None = Field(default=None, description="ignored; the endpoint has one model")
    voice: Annotated[str | None, BeforeValidator(_voice_name)] = Field(
        default=None, description="a voice's name, profile:NAME, a description (anything with spaces), or {id}"
    )
    instructions: str | None = Field(default=None, description="ignored; describe a voice or a scene instead")
    ref_audio: str | None = Field(default=None, description="reference recording: base64, or a data URI")
    ref_text: str | None = Field(default=None, description="transcript of the reference recording")
    scene: str | None = None
    language: str | None = None
    spoken_forms: bool | None = None
    voice_in_system: bool | None = None
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    ras_win_len: int | None = None
    ras_win_max_num_repeat: int | None = None
    max_frames: int | None = None
    chunk_method: str | None = None
    chunk_max_words: int | None = None
    context_chunks: int | None = None

    def row(self, request_id: str) -> dict[str, Any]:
        """Return the request as a manifest row, without its reference recording."""
        fields = {name: getattr(self, name) for name in (*_SCRIPT_FIELDS, "voice")}
        return {"id": request_id, "text": self.input} | {
            name: value for name, value in fields.items() if value is not None
        }


def read_speech(body: Mapping[str, Any]) -> SpeechRequest:
    """Validate a body of `/v1/audio/speech`.

    Raises:
        BadRequest: names the first invalid field.
    """
    try:
        # Clients send null for fields that are not set.
        return SpeechRequest.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise _first_error(error) from None


def read_delivery(body: Mapping[str, Any]) -> Delivery:
    """Return the delivery options of a script; `live` defaults to false."""
    try:
        options = {name: body[name] for name in Delivery.model_fields if body.get(name) is not None}
        return Delivery.model_validate({"live": False} | options)
    except ValidationError as error:
        raise _first_error(error) from None


def read_script(row: Mapping[str, Any]) -> Script:
    """Validate a manifest row.

    Raises:
        BadRequest: lists all errors.
    """
    try:
        return Script.model_validate(row)
    except ValidationError as error:
        found = faults(error)
        raise BadRequest("; ".join(found)[:2000], param=found[0].partition(":")[0].partition(".")[0]) from None


def _first_error(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    return BadRequest(f"{param or 'body'}: {first['msg']}", param=param)
