"""The bodies of requests: OpenAI's fields of speech and ours, and what every request may say of how it is delivered.

Unknown fields are ignored, as OpenAI's clients expect; known ones are honoured or refused, never swapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from higgs_model.audio.speed import FASTEST, SLOWEST
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
    """A voice may also be `{"id": NAME}`."""
    return value["id"] if isinstance(value, dict) and "id" in value else value


class Delivery(BaseModel):
    """How the sound comes back.

    Attributes:
        live: samples go out while they are made. Else each chunk goes out when it has passed its checks.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    response_format: StreamFormat = "mp3"
    speed: float = Field(default=1.0, ge=SLOWEST, le=FASTEST, allow_inf_nan=False)
    stream_format: Literal["audio", "sse"] = "audio"
    live: bool = True


class SpeechRequest(Delivery):
    """`POST /v1/audio/speech`."""

    input: str = Field(min_length=1, description="the text to be spoken")
    model: str | None = Field(default=None, description="any name; there is one model here")
    voice: Annotated[str | None, BeforeValidator(_voice_name)] = Field(
        default=None, description="a voice's name, profile:NAME, a description with spaces in it, or {id}"
    )
    instructions: str | None = Field(
        default=None, description="taken, and not used: describe a voice or a scene instead"
    )
    ref_audio: str | None = Field(default=None, description="a recording to speak like: base64, or a data URI")
    ref_text: str | None = Field(default=None, description="what that recording says")
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
        """The same as a manifest's row, but for its recording."""
        given = {name: getattr(self, name) for name in (*_SCRIPT_FIELDS, "voice")}
        return {"id": request_id, "text": self.input} | {name: one for name, one in given.items() if one is not None}


def read_speech(body: Mapping[str, Any]) -> SpeechRequest:
    """A body of `/v1/audio/speech`, checked.

    Raises:
        BadRequest: with the first field that is wrong.
    """
    try:
        # Null is what clients send for "not chosen".
        return SpeechRequest.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise _first_fault(error) from None


def read_delivery(body: Mapping[str, Any]) -> Delivery:
    """How a script's sound comes back; as checked takes unless it says `live`."""
    try:
        given = {name: body[name] for name in Delivery.model_fields if body.get(name) is not None}
        return Delivery.model_validate({"live": False} | given)
    except ValidationError as error:
        raise _first_fault(error) from None


def read_script(row: Mapping[str, Any]) -> Script:
    """A manifest's row, checked.

    Raises:
        BadRequest: with all its faults.
    """
    try:
        return Script.model_validate(row)
    except ValidationError as error:
        found = faults(error)
        raise BadRequest("; ".join(found)[:2000], param=found[0].partition(":")[0].partition(".")[0]) from None


def _first_fault(error: ValidationError) -> BadRequest:
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = str(fault["loc"][0]) if fault["loc"] else None
    return BadRequest(f"{param or 'body'}: {fault['msg']}", param=param)
