"""The HTTP face of an `Endpoint`: paths, bodies, headers, and every error in OpenAI's shape.

`create_app` makes an ASGI application that needs no Ray; Serve's ingress holds one.
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
from serve.http.errors import ApiError, BadRequest, Internal, NotAllowed, of_status
from serve.http.middleware import App, Outer, Receive, Scope, Send
from serve.http.request_log import RequestFacts
from serve.http.request_models import read_delivery, read_speech
from serve.http.security import KeyRing
from serve.speech.endpoint import Endpoint
from serve.speech.streaming import Answer

logger = logging.getLogger(__name__)

_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; media-src blob:; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_STARTED = int(time.time())


class Json(Response):
    """JSON in ASCII, so that there is no string that it cannot hold."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False).encode()


def create_app(endpoint: Endpoint, keys: KeyRing) -> App:
    """The whole application."""
    app = FastAPI(
        title="Higgs Audio endpoint",
        version="1",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    _add_errors(app)
    _add_speech(app, endpoint, keys)
    _add_voices(app, endpoint, keys)
    _add_rest(app, endpoint, keys)
    return Outer(app, endpoint.config.max_body_bytes, endpoint.metrics)


def _facts(request: Request) -> RequestFacts:
    facts: RequestFacts = request.state.facts
    facts.route = request.scope["route"].path
    return facts


Facts = Annotated[RequestFacts, Depends(_facts)]


def _add_errors(app: FastAPI) -> None:
    def answer(request: Request, error: ApiError) -> Response:
        facts: RequestFacts = request.state.facts
        facts.outcome, facts.error = error.code or "error", error.message
        return Json(error.body(), error.status, headers=error.headers())

    async def ours(request: Request, error: Exception) -> Response:
        return answer(request, error if isinstance(error, ApiError) else Internal("unknown"))

    async def frameworks(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        known = {404: f"there is no {request.method} {request.url.path[:200]}"}
        response = answer(request, of_status(status, known.get(status, str(getattr(error, "detail", "")))))
        if status == NotAllowed.status and isinstance(error, HTTPException):
            response.headers.update(error.headers or {})
        return response

    async def invalid(request: Request, error: Exception) -> Response:
        first = error.errors()[0] if isinstance(error, RequestValidationError) else {"loc": (), "msg": "invalid"}
        param = str(first["loc"][-1]) if first["loc"] else None
        return answer(request, BadRequest(f"{param}: {first['msg']}", param=param))

    async def unforeseen(request: Request, error: Exception) -> Response:
        facts: RequestFacts = request.state.facts
        logger.error("request %s", facts.request_id, exc_info=error)
        return answer(request, Internal("something went wrong here; it is in the log under this request's id"))

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(HTTPException, frameworks)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unforeseen)


# ---------------------------------------------------------------------- speech


def _add_speech(app: FastAPI, endpoint: Endpoint, keys: KeyRing) -> None:
    @app.post("/v1/audio/speech", **openapi.SPEECH)
    async def speech(request: Request, facts: Facts) -> Response:
        keys.check(request.headers)
        async with _body(request) as (fields, recording):
            wanted = read_speech(fields)
            answer = await endpoint.speech(wanted, recording, facts)
        if wanted.stream_format == "sse":
            return _SpokenResponse(endpoint, answer, answer.server_sent(with_chunks=False), "text/event-stream")
        return _SpokenResponse(endpoint, answer, answer.plain(), MEDIA_TYPES[wanted.response_format])

    @app.post("/v1/audio/scripts", **openapi.SCRIPTS)
    async def scripts(request: Request, facts: Facts) -> Response:
        keys.check(request.headers)
        async with _body(request, whole="script") as (fields, recording):
            delivery = read_delivery(fields)
            answer = await endpoint.script(fields, recording, delivery, facts)
        if _prefers_json(request.headers.get("accept", "")):
            try:
                with endpoint.speaking(facts):
                    return Json(await answer.described(), headers=_headers(answer))
            finally:
                await answer.close()
        if delivery.stream_format == "sse":
            return _SpokenResponse(endpoint, answer, answer.server_sent(with_chunks=True), "text/event-stream")
        return _SpokenResponse(endpoint, answer, answer.plain(), MEDIA_TYPES[delivery.response_format])


class _SpokenResponse(StreamingResponse):
    """A stream whose slot is free again when it ends, however it ends."""

    def __init__(self, endpoint: Endpoint, answer: Answer, content: AsyncIterator[bytes], media_type: str) -> None:
        super().__init__(content, media_type=media_type, headers=_headers(answer))
        self._endpoint, self._answer = endpoint, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._endpoint.speaking(self._answer.facts):
                await super().__call__(scope, receive, send)
        finally:
            await self._answer.close()


def _headers(answer: Answer) -> dict[str, str]:
    headers = {
        "x-sample-rate": str(answer.started.sample_rate_hz),
        "x-audio-channels": "1",
        "x-audio-format": answer.delivery.response_format,
        "x-audio-chunks": str(answer.started.num_chunks),
        "cache-control": "no-store",
        "x-accel-buffering": "no",
    }
    if answer.started.warnings:
        headers["x-warnings"] = json.dumps(list(answer.started.warnings), ensure_ascii=True)[:4000]
    return headers


def _prefers_json(accept: str) -> bool:
    """Whether JSON is asked for by name, and no sound before it."""
    wanted = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return "application/json" in wanted and not any(part.startswith("audio/") for part in wanted)


# ---------------------------------------------------------------------- bodies


@contextlib.asynccontextmanager
async def _body(request: Request, whole: str | None = None) -> AsyncIterator[tuple[dict[str, Any], bytes | None]]:
    """The fields of a JSON or multipart body, and the recording that came as a file.

    Args:
        whole: the form field that may hold all other fields as JSON.
    """
    # curl -d says that JSON is a form; nobody sends texts that way, so only multipart is one.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        yield _object(await request.body()), None
        return
    async with _form(request) as form:
        fields: dict[str, Any] = {name: value for name, value in form.items() if isinstance(value, str)}
        if whole is not None and whole in fields:
            fields |= _object(fields.pop(whole).encode())
        file = form.get("ref_audio")
        yield fields, await file.read() if isinstance(file, UploadFile) else None


@contextlib.asynccontextmanager
async def _form(request: Request) -> AsyncIterator[FormData]:
    try:
        form = await request.form(max_files=2, max_fields=50, max_part_size=1 << 20)
    except HTTPException as error:
        raise BadRequest(f"the form cannot be read: {error.detail}") from None
    try:
        yield form
    finally:
        await form.close()


def _object(body: bytes) -> dict[str, Any]:
    """A JSON object; numbers that are none are refused."""
    try:
        found = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON; send an object with content-type application/json") from None
    if not isinstance(found, dict):
        raise BadRequest("the body is JSON, but not an object")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(constant)


# ---------------------------------------------------------------------- voices


def _add_voices(app: FastAPI, endpoint: Endpoint, keys: KeyRing) -> None:
    @app.get("/v1/audio/voices", **openapi.VOICES)
    async def voices(facts: Facts) -> Response:
        listed = await endpoint.list_voices()
        rows = [{"id": one.id, "name": one.name, "description": one.description} for one in listed]
        return Json({"object": "list", "voices": rows, "data": rows})

    @app.post("/v1/audio/voices", **openapi.ADD_VOICE)
    async def add_voice(request: Request, facts: Facts) -> Response:
        keys.check(request.headers)
        async with _form(request) as form:
            file = form.get("audio_sample")
            if not isinstance(file, UploadFile):
                raise BadRequest("audio_sample: send the recording as a file of a multipart form", param="audio_sample")
            fields = _texts(form, ("name", "consent", "transcript"))
            warnings = await endpoint.add_voice(
                fields["name"], await file.read(), fields["transcript"] or None, fields["consent"]
            )
        name = fields["name"]
        row = {
            "id": name,
            "object": "audio.voice",
            "name": name,
            "type": "audio_sample",
            "created_at": int(time.time()),
        }
        return Json(row | {"warnings": warnings}, 201)

    @app.delete("/v1/audio/voices/{voice_id}", **openapi.REMOVE_VOICE)
    async def remove_voice(voice_id: str, request: Request, facts: Facts) -> Response:
        keys.check(request.headers)
        await endpoint.remove_voice(voice_id)
        return Json({"id": voice_id, "object": "audio.voice.deleted", "deleted": True})


def _texts(form: FormData, names: tuple[str, ...]) -> Mapping[str, str]:
    found = {}
    for name in names:
        value = form.get(name, "")
        if not isinstance(value, str):
            raise BadRequest(f"{name}: wanted text, not a file", param=name)
        found[name] = value
    return found


# ---------------------------------------------------------------------- the rest


def _add_rest(app: FastAPI, endpoint: Endpoint, keys: KeyRing) -> None:
    model = {"id": endpoint.config.model, "object": "model", "created": _STARTED, "owned_by": "higgs-audio"}
    page = importlib.resources.files("serve.http").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/v1/models", **openapi.MODELS)
    async def models(request: Request, facts: Facts) -> Response:
        keys.check(request.headers)
        return Json({"object": "list", "data": [model]})

    @app.get("/v1/models/{model_id:path}", include_in_schema=False)
    async def one_model(request: Request, facts: Facts) -> Response:
        # Every name means the same model, as it does in a request for speech.
        keys.check(request.headers)
        return Json(model)

    @app.get("/healthz", **openapi.HEALTH)
    async def healthz(facts: Facts) -> Response:
        condition = await endpoint.condition()
        return Json({"status": condition}, 200 if condition == "ready" else 503)

    @app.get("/", include_in_schema=False)
    async def show_page(facts: Facts) -> Response:
        return HTMLResponse(page, headers={"content-security-policy": _PAGE_POLICY, "referrer-policy": "no-referrer"})
