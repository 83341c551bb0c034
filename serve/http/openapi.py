"""The OpenAPI operation of each path, written by hand because FastAPI does not parse the request bodies."""

from __future__ import annotations

from typing import Any

from serve.http.request_models import DeliveryOptions, SpeechRequest

_ERROR_SCHEMA = {
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
_ERROR_DESCRIPTIONS = {
    400: "invalid request; `param` names the field",
    401: "missing or unknown API key",
    404: "not found",
    409: "already exists",
    413: "request body or recording too large",
    429: "all slots are in use and the queue is full; see retry-after",
    500: "internal error",
    503: "not ready; see retry-after",
    504: "the request exceeded its time limit",
}


def _responses(*errors: int, **ok: Any) -> dict[int | str, Any]:
    error_body = {"content": {"application/json": {"schema": _ERROR_SCHEMA}}}
    responses: dict[int | str, Any] = {int(name[1:]): value for name, value in ok.items()}
    return responses | {status: {"description": _ERROR_DESCRIPTIONS[status]} | error_body for status in errors}


def _json_response(description: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "required": list(properties), "properties": properties}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_AUDIO_MEDIA_TYPES = ("audio/mpeg", "audio/wav", "audio/flac", "audio/ogg", "audio/pcm", "text/event-stream")
_BINARY = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}
_AUDIO_RESPONSE: dict[str, Any] = {
    "description": "the audio, streamed",
    "content": {media_type: _BINARY for media_type in _AUDIO_MEDIA_TYPES},
}
_SYNTHESIS_ERRORS = (400, 401, 413, 429, 500, 503, 504)

_SPEECH_SCHEMA = SpeechRequest.model_json_schema()
_SCRIPT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "a row of a batch job's manifest, and delivery options",
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
    | DeliveryOptions.model_json_schema()["properties"],
}


def _operation(summary: str, **options: Any) -> dict[str, Any]:
    return {"summary": summary, "response_model": None, **options}


def _request_body(json_schema: dict[str, Any], form_schema: dict[str, Any] | None = None) -> dict[str, Any]:
    content = {"application/json": {"schema": json_schema}}
    if form_schema is not None:
        content = {"multipart/form-data": {"schema": form_schema}}
    return {"requestBody": {"required": True, "content": content}}


SPEECH = _operation(
    "Synthesize a text",
    responses=_responses(*_SYNTHESIS_ERRORS, _200=_AUDIO_RESPONSE),
    openapi_extra=_request_body(_SPEECH_SCHEMA),
)
SCRIPTS = _operation(
    "Synthesize a script of any length, with one or more speakers",
    responses=_responses(
        *_SYNTHESIS_ERRORS,
        _200=_AUDIO_RESPONSE
        | {
            "content": _AUDIO_RESPONSE["content"]
            | {"application/json": {"schema": {"type": "object", "required": ["chunks"]}}}
        },
    ),
    openapi_extra=_request_body(_SCRIPT_SCHEMA),
)
VOICES = _operation(
    "List voices",
    responses=_responses(500, 503, _200=_json_response("the voices", voices={"type": "array"}, data={"type": "array"})),
)
ADD_VOICE = _operation(
    "Add a voice from a recording",
    status_code=201,
    responses=_responses(
        *(400, 401, 409, 413, 500, 503),
        _201=_json_response("the voice", id={"type": "string"}, name={"type": "string"}, warnings={"type": "array"}),
    ),
    openapi_extra=_request_body(
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
    "Delete a voice",
    responses=_responses(
        *(400, 401, 404, 500, 503),
        _200=_json_response("deleted", id={"type": "string"}, deleted={"type": "boolean"}),
    ),
)
MODELS = _operation(
    "List models",
    responses=_responses(401, 500, _200=_json_response("the models", data={"type": "array"})),
)
HEALTH = _operation(
    "Health: ready, loading or broken",
    responses={
        200: _json_response("ready", status={"const": "ready"}),
        503: _json_response("not ready", status={"enum": ["loading", "broken"]}),
    },
)
