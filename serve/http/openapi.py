"""What `/openapi.json` says of each path. Bodies are read by our own hands, so it is said by hand what they hold."""

from __future__ import annotations

from typing import Any

from serve.http.request_models import Delivery, SpeechRequest

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MEANINGS = {
    400: "what was sent cannot be used; `param` names the field",
    401: "a key is needed",
    404: "there is no such thing",
    409: "it is there already",
    413: "too many bytes",
    429: "the queue is full; see retry-after",
    500: "a fault of ours",
    503: "not ready; see retry-after",
    504: "it took longer than a request may",
}


def _answers(*errors: int, **ok: Any) -> dict[int | str, Any]:
    described = {"content": {"application/json": {"schema": _ERROR}}}
    answers: dict[int | str, Any] = {int(name[1:]): value for name, value in ok.items()}
    return answers | {status: {"description": _MEANINGS[status]} | described for status in errors}


def _json(description: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "required": list(properties), "properties": properties}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_AUDIO_TYPES = ("audio/mpeg", "audio/wav", "audio/flac", "audio/ogg", "audio/pcm", "text/event-stream")
_SOUND = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}
_SPOKEN: dict[str, Any] = {
    "description": "the sound, as it is made",
    "content": {kind: _SOUND for kind in _AUDIO_TYPES},
}
_FAULTS = (400, 401, 413, 429, 500, 503, 504)

_SPEECH_SCHEMA = SpeechRequest.model_json_schema()
_SCRIPT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "a row of the batch job's manifest, and how its sound comes back",
    "properties": {
        "id": {"type": "string"},
        "text": {"type": "string"},
        "turns": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["speaker", "text"],
                "properties": {"speaker": {"type": "string"}, "text": {"type": "string"}},
            },
        },
        "voice": {"type": "string"},
        "voices": {"type": "object", "additionalProperties": {"type": "string"}},
        "scene": {"type": "string"},
        "ref_audio": {"type": "string"},
        "ref_text": {"type": "string"},
        "seed": {"type": "integer", "minimum": 0},
        "temperature": {"type": "number", "minimum": 0, "maximum": 10},
        "chunk_method": {"enum": ["auto", "sentence", "word", "speaker", "none"]},
    }
    | Delivery.model_json_schema()["properties"],
}


def _operation(summary: str, **more: Any) -> dict[str, Any]:
    return {"summary": summary, "response_model": None, **more}


def _body(schema: dict[str, Any], file: dict[str, Any] | None = None) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}} if file is None else {"multipart/form-data": {"schema": file}}
    return {"requestBody": {"required": True, "content": content}}


SPEECH = _operation(
    "Speak a text",
    responses=_answers(*_FAULTS, _200=_SPOKEN),
    openapi_extra=_body(_SPEECH_SCHEMA),
)
SCRIPTS = _operation(
    "Speak a script of any length, with one or several speakers",
    responses=_answers(
        *_FAULTS,
        _200=_SPOKEN
        | {
            "content": _SPOKEN["content"] | {"application/json": {"schema": {"type": "object", "required": ["chunks"]}}}
        },
    ),
    openapi_extra=_body(_SCRIPT_SCHEMA),
)
VOICES = _operation(
    "All voices that may be named",
    responses=_answers(500, 503, _200=_json("the voices", voices={"type": "array"}, data={"type": "array"})),
)
ADD_VOICE = _operation(
    "Keep a recording as a voice",
    status_code=201,
    responses=_answers(
        *(400, 401, 409, 413, 500, 503),
        _201=_json("the voice", id={"type": "string"}, name={"type": "string"}, warnings={"type": "array"}),
    ),
    openapi_extra=_body(
        {},
        {
            "type": "object",
            "required": ["name", "consent", "audio_sample"],
            "properties": {
                "name": {"type": "string"},
                "consent": {"type": "string"},
                "transcript": {"type": "string"},
                "audio_sample": {"type": "string", "format": "binary"},
            },
        },
    ),
)
REMOVE_VOICE = _operation(
    "Forget a recorded voice",
    responses=_answers(
        *(400, 401, 404, 500, 503),
        _200=_json("it is gone", id={"type": "string"}, deleted={"type": "boolean"}),
    ),
)
MODELS = _operation(
    "The model, as OpenAI's clients ask for it",
    responses=_answers(401, 500, _200=_json("the models", data={"type": "array"})),
)
HEALTH = _operation(
    "Whether anybody can speak: loading, ready or broken",
    responses={
        200: _json("ready", status={"const": "ready"}),
        503: _json("not ready", status={"enum": ["loading", "broken"]}),
    },
)
