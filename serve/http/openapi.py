"""The OpenAPI description of each path, written out because request bodies are parsed without FastAPI."""

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
_DESCRIPTIONS = {
    400: "invalid request; `param` names the field",
    401: "missing or unknown API key",
    404: "not found",
    409: "already exists",
    413: "body or recording too large",
    429: "the queue is full; see retry-after",
    500: "internal error",
    503: "not ready; see retry-after",
    504: "the request took too long",
}


def _responses(*errors: int, **ok: Any) -> dict[int | str, Any]:
    error_body = {"content": {"application/json": {"schema": _ERROR}}}
    responses: dict[int | str, Any] = {int(name[1:]): value for name, value in ok.items()}
    return responses | {status: {"description": _DESCRIPTIONS[status]} | error_body for status in errors}


def _json(description: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "required": list(properties), "properties": properties}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_AUDIO_TYPES = ("audio/mpeg", "audio/wav", "audio/flac", "audio/ogg", "audio/pcm", "text/event-stream")
_BINARY = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}
_AUDIO_RESPONSE: dict[str, Any] = {
    "description": "the audio, streamed",
    "content": {kind: _BINARY for kind in _AUDIO_TYPES},
}
_ERRORS = (400, 401, 413, 429, 500, 503, 504)

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
    | Delivery.model_json_schema()["properties"],
}


def _operation(summary: str, **more: Any) -> dict[str, Any]:
    return {"summary": summary, "response_model": None, **more}


def _body(schema: dict[str, Any], file: dict[str, Any] | None = None) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}} if file is None else {"multipart/form-data": {"schema": file}}
    return {"requestBody": {"required": True, "content": content}}


SPEECH = _operation(
    "Synthesize a text",
    responses=_responses(*_ERRORS, _200=_AUDIO_RESPONSE),
    openapi_extra=_body(_SPEECH_SCHEMA),
)
SCRIPTS = _operation(
    "Synthesize a script of any length, with one or more speakers",
    responses=_responses(
        *_ERRORS,
        _200=_AUDIO_RESPONSE
        | {
            "content": _AUDIO_RESPONSE["content"]
            | {"application/json": {"schema": {"type": "object", "required": ["chunks"]}}}
        },
    ),
    openapi_extra=_body(_SCRIPT_SCHEMA),
)
VOICES = _operation(
    "List voices",
    responses=_responses(500, 503, _200=_json("the voices", voices={"type": "array"}, data={"type": "array"})),
)
ADD_VOICE = _operation(
    "Add a voice from a recording",
    status_code=201,
    responses=_responses(
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
    "Delete a voice",
    responses=_responses(
        *(400, 401, 404, 500, 503),
        _200=_json("deleted", id={"type": "string"}, deleted={"type": "boolean"}),
    ),
)
MODELS = _operation(
    "List models",
    responses=_responses(401, 500, _200=_json("the models", data={"type": "array"})),
)
HEALTH = _operation(
    "Health: ready, loading or broken",
    responses={
        200: _json("ready", status={"const": "ready"}),
        503: _json("not ready", status={"enum": ["loading", "broken"]}),
    },
)
