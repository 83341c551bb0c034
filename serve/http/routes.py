"""HTTP routes of the endpoint: paths, request bodies, headers, and errors in OpenAI's format.

`create_app` builds an ASGI application that does not need Ray; the ingress deployment serves it.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from higgs_model.audio.streams import MEDIA_TYPES
from serve.http import openapi
from serve.http.errors import ApiError, BadRequest, InternalServerError, MethodNotAllowed, NotFound, error_from_status
from serve.http.middleware import App, Receive, RequestMiddleware, Scope, Send
from serve.http.request_log import RequestContext
from serve.http.request_models import parse_delivery_options, parse_speech_request
from serve.http.security import ApiKeys
from serve.speech.service import SpeechService
from serve.speech.streaming import SpeechStream

logger = logging.getLogger(__name__)

_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; media-src blob:; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_STARTED_AT = int(time.time())


class AsciiJsonResponse(Response):
    """JSON escaped to ASCII, so that strings with lone surrogates can be encoded."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False).encode()


def create_app(endpoint: SpeechService, keys: ApiKeys) -> App:
    """Build the ASGI application."""
    app = FastAPI(
        title="Higgs Audio endpoint",
        version="1",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    _add_error_handlers(app)
    _add_speech_routes(app, endpoint, keys)
    _add_voice_routes(app, endpoint, keys)
    _add_other_routes(app, endpoint, keys)
    return RequestMiddleware(app, endpoint.config.max_body_bytes, endpoint.metrics)


def _get_context(request: Request) -> RequestContext:
    context: RequestContext = request.state.context
    context.route = request.scope["route"].path
    return context


Context = Annotated[RequestContext, Depends(_get_context)]


def _add_error_handlers(app: FastAPI) -> None:
    def respond(request: Request, error: ApiError) -> Response:
        context: RequestContext = request.state.context
        context.outcome, context.error = error.code or "error", error.message
        return AsciiJsonResponse(error.body(), error.status, headers=error.headers())

    async def api_error(request: Request, error: Exception) -> Response:
        return respond(request, error if isinstance(error, ApiError) else InternalServerError("unknown error"))

    async def http_error(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        message = str(getattr(error, "detail", ""))
        if status == NotFound.status:
            message = f"no route {request.method} {request.url.path[:200]}"
        response = respond(request, error_from_status(status, message))
        if status == MethodNotAllowed.status and isinstance(error, HTTPException):
            response.headers.update(error.headers or {})
        return response

    async def validation_error(request: Request, error: Exception) -> Response:
        first = error.errors()[0] if isinstance(error, RequestValidationError) else {"loc": (), "msg": "invalid"}
        param = str(first["loc"][-1]) if first["loc"] else None
        return respond(request, BadRequest(f"{param}: {first['msg']}", param=param))

    async def unexpected_error(request: Request, error: Exception) -> Response:
        context: RequestContext = request.state.context
        logger.error("request %s failed", context.request_id, exc_info=error)
        return respond(request, InternalServerError("internal error; the log has the details under this request's id"))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(Exception, unexpected_error)


# ---------------------------------------------------------------------- speech


def _add_speech_routes(app: FastAPI, endpoint: SpeechService, keys: ApiKeys) -> None:
    @app.post("/v1/audio/speech", **openapi.SPEECH)
    async def speech(request: Request, context: Context) -> Response:
        keys.check(request.headers)
        async with _read_body(request) as (fields, recording):
            speech_request = parse_speech_request(fields)
            stream = await endpoint.stream_speech(speech_request, recording, context)
        if speech_request.stream_format == "sse":
            return _SpeechResponse(endpoint, stream, stream.server_sent_events(with_chunks=False), "text/event-stream")
        return _SpeechResponse(endpoint, stream, stream.audio_bytes(), MEDIA_TYPES[speech_request.response_format])

    @app.post("/v1/audio/scripts", **openapi.SCRIPTS)
    async def scripts(request: Request, context: Context) -> Response:
        keys.check(request.headers)
        async with _read_body(request, json_field="script") as (fields, recording):
            delivery = parse_delivery_options(fields)
            stream = await endpoint.stream_script(fields, recording, delivery, context)
        if _prefers_json(request.headers.get("accept", "")):
            try:
                with endpoint.running(context):
                    return AsciiJsonResponse(await stream.to_json(), headers=_response_headers(stream))
            finally:
                await stream.close()
        if delivery.stream_format == "sse":
            return _SpeechResponse(endpoint, stream, stream.server_sent_events(with_chunks=True), "text/event-stream")
        return _SpeechResponse(endpoint, stream, stream.audio_bytes(), MEDIA_TYPES[delivery.response_format])


class _SpeechResponse(StreamingResponse):
    """A streaming response that frees its slot when it ends, even if the client disconnects or synthesis fails."""

    def __init__(
        self, endpoint: SpeechService, stream: SpeechStream, content: AsyncIterator[bytes], media_type: str
    ) -> None:
        super().__init__(content, media_type=media_type, headers=_response_headers(stream))
        self._endpoint, self._stream = endpoint, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._endpoint.running(self._stream.context):
                await super().__call__(scope, receive, send)
        finally:
            await self._stream.close()


def _response_headers(stream: SpeechStream) -> dict[str, str]:
    headers = {
        "x-sample-rate": str(stream.started.sample_rate_hz),
        "x-audio-channels": "1",
        "x-audio-format": stream.delivery.response_format,
        "x-audio-chunks": str(stream.started.num_chunks),
        "cache-control": "no-store",
        "x-accel-buffering": "no",
    }
    if stream.started.warnings:
        headers["x-warnings"] = json.dumps(list(stream.started.warnings), ensure_ascii=True)[:4000]
    return headers


def _prefers_json(accept: str) -> bool:
    """Return whether the Accept header names JSON and no audio type."""
    accepted = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return "application/json" in accepted and not any(part.startswith("audio/") for part in accepted)


# ---------------------------------------------------------------------- bodies


@contextlib.asynccontextmanager
async def _read_body(
    request: Request, json_field: str | None = None
) -> AsyncIterator[tuple[dict[str, Any], bytes | None]]:
    """Yield the fields of a JSON or multipart body, and the uploaded reference recording, if any.

    Args:
        json_field: a form field that may contain all other fields as a JSON object.
    """
    # `curl -d` labels JSON as a URL-encoded form. Nobody sends text in such forms, so only multipart is read as a form.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        yield _parse_json_object(await request.body()), None
        return
    async with _read_form(request) as form:
        fields: dict[str, Any] = {name: value for name, value in form.items() if isinstance(value, str)}
        if json_field is not None and json_field in fields:
            fields |= _parse_json_object(fields.pop(json_field).encode())
        upload = form.get("ref_audio")
        yield fields, await upload.read() if isinstance(upload, UploadFile) else None


@contextlib.asynccontextmanager
async def _read_form(request: Request) -> AsyncIterator[FormData]:
    try:
        form = await request.form(max_files=2, max_fields=50, max_part_size=1 << 20)
    except HTTPException as error:
        raise BadRequest(f"the form cannot be read: {error.detail}") from None
    try:
        yield form
    finally:
        await form.close()


def _parse_json_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object; reject NaN and Infinity."""
    try:
        value = json.loads(body, parse_constant=_reject_constant)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON; send an object with content-type application/json") from None
    if not isinstance(value, dict):
        raise BadRequest("the body is JSON, but not an object")
    return value


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


# ---------------------------------------------------------------------- voices


def _add_voice_routes(app: FastAPI, endpoint: SpeechService, keys: ApiKeys) -> None:
    @app.get("/v1/audio/voices", **openapi.VOICES)
    async def voices(context: Context) -> Response:
        listed = await endpoint.list_voices()
        rows = [{"id": voice.id, "name": voice.name, "description": voice.description} for voice in listed]
        return AsciiJsonResponse({"object": "list", "voices": rows, "data": rows})

    @app.post("/v1/audio/voices", **openapi.ADD_VOICE)
    async def add_voice(request: Request, context: Context) -> Response:
        keys.check(request.headers)
        async with _read_form(request) as form:
            upload = form.get("audio_sample")
            if not isinstance(upload, UploadFile):
                raise BadRequest("audio_sample: send the recording as a multipart file", param="audio_sample")
            fields = _text_fields(form, ("name", "consent", "transcript"))
            warnings = await endpoint.add_voice(
                fields["name"], await upload.read(), fields["transcript"] or None, fields["consent"]
            )
        name = fields["name"]
        row = {
            "id": name,
            "object": "audio.voice",
            "name": name,
            "type": "audio_sample",
            "created_at": int(time.time()),
        }
        return AsciiJsonResponse(row | {"warnings": warnings}, 201)

    @app.delete("/v1/audio/voices/{voice_id}", **openapi.REMOVE_VOICE)
    async def remove_voice(voice_id: str, request: Request, context: Context) -> Response:
        keys.check(request.headers)
        await endpoint.remove_voice(voice_id)
        return AsciiJsonResponse({"id": voice_id, "object": "audio.voice.deleted", "deleted": True})


def _text_fields(form: FormData, names: tuple[str, ...]) -> Mapping[str, str]:
    fields = {}
    for name in names:
        value = form.get(name, "")
        if not isinstance(value, str):
            raise BadRequest(f"{name}: got a file, expected text", param=name)
        fields[name] = value
    return fields


# ---------------------------------------------------------------------- models, health, page


def _add_other_routes(app: FastAPI, endpoint: SpeechService, keys: ApiKeys) -> None:
    model = {"id": endpoint.config.model, "object": "model", "created": _STARTED_AT, "owned_by": "higgs-audio"}
    page = importlib.resources.files("serve.http").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/v1/models", **openapi.MODELS)
    async def models(request: Request, context: Context) -> Response:
        keys.check(request.headers)
        return AsciiJsonResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{model_id:path}", include_in_schema=False)
    async def get_model(request: Request, context: Context) -> Response:
        # As in speech requests, any name refers to the endpoint's only model.
        keys.check(request.headers)
        return AsciiJsonResponse(model)

    @app.get("/healthz", **openapi.HEALTH)
    async def healthz(context: Context) -> Response:
        status = await endpoint.health()
        return AsciiJsonResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/", include_in_schema=False)
    async def show_page(context: Context) -> Response:
        return HTMLResponse(page, headers={"content-security-policy": _PAGE_POLICY, "referrer-policy": "no-referrer"})
