"""Request bodies: OpenAI's speech fields with our extensions, and delivery options.

Unknown fields are ignored, as OpenAI's clients expect. Known fields are honoured or rejected, never silently changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from higgs_model.audio.streams import StreamFormat
from higgs_model.audio.time_stretch import MAX_SPEED, MIN_SPEED
from higgs_model.script.script import Script, error_messages
from serve.http.errors import BadRequest

OPENAI_VOICES = (
    *("alloy", "ash", "ballad", "coral", "echo", "fable", "onyx", "nova", "sage", "shimmer", "verse", "marin", "cedar"),
)
_SCRIPT_FIELDS = (
    *("scene", "ref_text", "language", "spoken_forms", "voice_in_system", "seed", "temperature", "top_k", "top_p"),
    *("ras_win_len", "ras_win_max_num_repeat", "max_frames", "chunk_method", "chunk_max_words", "context_chunks"),
)


def _unwrap_voice_id(value: object) -> object:
    """Accept `{"id": NAME}` as well as a name."""
    return value["id"] if isinstance(value, dict) and "id" in value else value


class DeliveryOptions(BaseModel):
    """How the audio is encoded and streamed.

    Attributes:
        speed: playback speed; the pitch is preserved.
        live: stream samples while they are generated; otherwise stream each chunk once its best take is chosen.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    response_format: StreamFormat = "mp3"
    speed: float = Field(default=1.0, ge=MIN_SPEED, le=MAX_SPEED, allow_inf_nan=False)
    stream_format: Literal["audio", "sse"] = "audio"
    live: bool = True


class SpeechRequest(DeliveryOptions):
    """`POST /v1/audio/speech`."""

    input: str = Field(min_length=1, description="the text to synthesize")
    model: str | None = Field(default=None, description="ignored; the endpoint has one model")
    voice: Annotated[str | None, BeforeValidator(_unwrap_voice_id)] = Field(
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

    def to_row(self, request_id: str) -> dict[str, Any]:
        """Return the request as a manifest row, without its reference recording."""
        fields = {name: getattr(self, name) for name in (*_SCRIPT_FIELDS, "voice")}
        return {"id": request_id, "text": self.input} | {
            name: value for name, value in fields.items() if value is not None
        }


def parse_speech_request(body: Mapping[str, Any]) -> SpeechRequest:
    """Parse the body of `/v1/audio/speech`.

    Raises:
        BadRequest: a field is invalid; `param` names the first one.
    """
    try:
        # Some clients send null for unset fields.
        return SpeechRequest.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise _bad_request_from(error) from None


def parse_delivery_options(body: Mapping[str, Any]) -> DeliveryOptions:
    """Parse the delivery options of `/v1/audio/scripts`; here `live` defaults to false.

    Raises:
        BadRequest: an option is invalid; `param` names the first one.
    """
    try:
        options = {name: body[name] for name in DeliveryOptions.model_fields if body.get(name) is not None}
        return DeliveryOptions.model_validate({"live": False} | options)
    except ValidationError as error:
        raise _bad_request_from(error) from None


def parse_script(row: Mapping[str, Any]) -> Script:
    """Parse a manifest row.

    Raises:
        BadRequest: the row is invalid; the message lists all errors, `param` names the field of the first one.
    """
    try:
        return Script.model_validate(row)
    except ValidationError as error:
        messages = error_messages(error)
        param = messages[0].partition(":")[0].partition(".")[0]
        raise BadRequest("; ".join(messages)[:2000], param=param) from None


def _bad_request_from(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    return BadRequest(f"{param or 'body'}: {first['msg']}", param=param)
