"""The endpoint without HTTP: speech requests, script requests, and the voice library.

Checks run in a fixed order: text and fields, then the reference recording, then the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from higgs_model.script.script import Script
from serve.deployments.settings import EndpointSettings
from serve.http.background import is_cheap_to_plan, run_in_thread
from serve.http.errors import ApiError, BadRequest, ServiceUnavailable, TooManyRequests
from serve.http.request_log import RequestContext, RequestMetrics
from serve.http.request_models import OPENAI_VOICES, DeliveryOptions, SpeechRequest, parse_script
from serve.speech.events import HealthStatus, SynthesisRequest, SynthesizerBackend
from serve.speech.streaming import SpeechStream, open_speech_stream
from serve.voices.reference_audio import ReferenceLimits, check_reference, decode_reference
from serve.voices.reference_download import ReferenceDownloader
from serve.voices.voice_library import ListedVoice, VoiceLibrary, check_name

_URL_SCHEMES = ("http://", "https://", "ftp://", "file://", "s3://")
_REFERENCE_PLACEHOLDER = "ref_audio"
"""Placeholder in a row for the reference recording, which is sent separately."""
_CONSENT_CHARS = 4000
_TRANSCRIPT_CHARS = 4000
_MIN_RETRY_S, _MAX_RETRY_S = 2, 60


class SpeechService:
    """The endpoint of one ingress replica.

    Args:
        backend: the synthesizer replicas.
        library: the voice library, if any.
    """

    def __init__(
        self,
        config: EndpointSettings,
        backend: SynthesizerBackend,
        library: VoiceLibrary | None = None,
        metrics: RequestMetrics | None = None,
        downloader: ReferenceDownloader | None = None,
    ) -> None:
        self.config, self.backend, self.library = config, backend, library
        self.metrics = metrics or RequestMetrics()
        self.limits = ReferenceLimits(config.max_reference_bytes, config.max_reference_s)
        self._downloader = downloader or ReferenceDownloader(config.reference_urls, config.max_reference_bytes)
        self._waiting = self._running = 0
        self._mean_request_s = float(_MIN_RETRY_S)

    # ------------------------------------------------------------------ speech

    async def stream_speech(
        self, request: SpeechRequest, recording: bytes | None, context: RequestContext
    ) -> SpeechStream:
        """Start synthesizing a text in one voice, and return its stream.

        Args:
            recording: the content of an uploaded reference recording, if any.

        Raises:
            ApiError: the request is invalid, or cannot be served now.
        """
        self._check_length(request.input, self.config.max_input_chars, "input")
        row = request.to_row(context.request_id)
        warnings: tuple[str, ...] = ()
        if request.ref_audio is None and recording is None:
            row["voice"], warnings = await self._choose_voice(request.voice)
        else:
            row.pop("voice", None)
        if request.instructions:
            warnings += ("instructions are ignored; describe the voice or the scene instead",)
        try:
            return await self._start(row, request.ref_audio, recording, request, context, warnings)
        except BadRequest as error:
            if error.param == "text":
                error.param, error.message = "input", error.message.replace("text: ", "input: ", 1)
            raise

    async def stream_script(
        self, row: Mapping[str, Any], recording: bytes | None, delivery: DeliveryOptions, context: RequestContext
    ) -> SpeechStream:
        """Start synthesizing a manifest row, and return its stream.

        Args:
            recording: the content of an uploaded reference recording, if any.

        Raises:
            ApiError: the request is invalid, or cannot be served now.
        """
        row = {"id": context.request_id} | {name: value for name, value in row.items() if value is not None}
        if isinstance(row.get("voice"), dict):
            row["voice"] = row["voice"].get("id")
        ref_audio = row.pop("ref_audio", None)
        if ref_audio is not None and not isinstance(ref_audio, str):
            raise BadRequest(
                "ref_audio: send the recording as base64, a data URI or a multipart file", param="ref_audio"
            )
        return await self._start(row, ref_audio, recording, delivery, context, ())

    async def _start(
        self,
        row: Mapping[str, Any],
        ref_audio: str | None,
        recording: bytes | None,
        delivery: DeliveryOptions,
        context: RequestContext,
        warnings: tuple[str, ...],
    ) -> SpeechStream:
        deadline_s = asyncio.get_running_loop().time() + self.config.request_timeout_s - context.elapsed_s()
        has_reference = ref_audio is not None or recording is not None
        row_with_placeholder = dict(row) | ({"ref_audio": _REFERENCE_PLACEHOLDER} if has_reference else {})
        script = await run_in_thread(self._parse_script, row_with_placeholder, inline=is_cheap_to_plan(row))
        context.characters, context.format = len(script.tagged_text()), delivery.response_format
        context.voice = _REFERENCE_PLACEHOLDER if has_reference else script.voice
        reference = await self._load_reference(ref_audio, recording)
        fields = script.model_dump(exclude_none=True, exclude={"ref_audio"})
        if reference is not None:
            fields["ref_audio"] = _REFERENCE_PLACEHOLDER
        request = SynthesisRequest(context.request_id, fields, reference, delivery.live)
        async with self._queue_place():
            return await open_speech_stream(self.backend, request, delivery, context, warnings, deadline_s)

    def _parse_script(self, row: dict[str, Any]) -> Script:
        script = parse_script(row)
        self._check_length(script.tagged_text(), self.config.max_script_chars, "text")
        aliases = self.config.voice_aliases
        resolved: dict[str, Any] = {}
        if script.voice in aliases:
            resolved["voice"] = aliases[script.voice]
        if script.voices is not None:
            resolved["voices"] = {speaker: aliases.get(voice, voice) for speaker, voice in script.voices.items()}
        return script.model_copy(update=resolved) if resolved else script

    async def _choose_voice(self, voice: str | None) -> tuple[str | None, tuple[str, ...]]:
        """Return the voice to use for the requested one, and warnings for the client."""
        default = self.config.default_voice
        if voice is None or not voice.strip():
            return default, ()
        if voice in self.config.voice_aliases or voice not in OPENAI_VOICES:
            return voice, ()
        if self.library is not None and voice in await asyncio.to_thread(
            lambda: self._require_library().voices().names()
        ):
            return voice, ()
        fallback = f"{default!r} is used" if default else "the model picks a voice"
        return default, (f"this endpoint has no voice {voice!r}, so {fallback} instead",)

    async def _load_reference(self, ref_audio: str | None, recording: bytes | None) -> bytes | None:
        if ref_audio is not None and ref_audio.startswith(_URL_SCHEMES):
            recording = await asyncio.to_thread(self._downloader.download, ref_audio)
        elif ref_audio is not None:
            recording = await asyncio.to_thread(decode_reference, ref_audio, self.limits)
        if recording is None:
            return None
        return (await asyncio.to_thread(check_reference, recording, self.limits)).content

    @staticmethod
    def _check_length(text: str, max_chars: int, param: str) -> None:
        if len(text) > max_chars:
            raise BadRequest(
                f"{param}: {len(text)} characters, but a request may have at most {max_chars}; send longer texts to "
                "/v1/audio/scripts, or run a batch job",
                param=param,
            )

    # ------------------------------------------------------------------ load

    @contextlib.asynccontextmanager
    async def _queue_place(self) -> AsyncIterator[None]:
        """Occupy a place in the queue until a request's first samples are available.

        Raises:
            TooManyRequests: all slots are in use and the queue is full.
        """
        slots = -(-self.backend.slots() // self.config.ingress_replicas)
        if self._waiting + self._running >= slots + self.config.max_queued:
            raise TooManyRequests(
                "all slots are in use and the queue is full; try again later", retry_after_s=self.retry_after_s()
            )
        self._waiting += 1
        self._export_load()
        try:
            yield
        finally:
            self._waiting -= 1
            self._export_load()

    @contextlib.contextmanager
    def running(self, context: RequestContext) -> Iterator[None]:
        """Count a request as running while its response is sent."""
        self._running += 1
        self._export_load()
        try:
            yield
        finally:
            self._running -= 1
            self._mean_request_s += 0.1 * (context.elapsed_s() - self._mean_request_s)
            self._export_load()

    def _export_load(self) -> None:
        self.metrics.set_in_flight(self._waiting, self._running)

    def retry_after_s(self) -> int:
        """Return the `retry-after` of a rejected request: the moving average of request durations, bounded."""
        return max(1, min(_MAX_RETRY_S, math.ceil(self._mean_request_s)))

    async def health(self) -> HealthStatus:
        """Return whether a replica is ready to serve requests."""
        return await self.backend.health()

    # ------------------------------------------------------------------ voices

    def _require_library(self) -> VoiceLibrary:
        if self.library is None:
            raise BadRequest(
                "this endpoint has no voice library; start it with voices=FOLDER or voices=s3://BUCKET/PREFIX"
            )
        return self.library

    async def list_voices(self) -> list[ListedVoice]:
        """Return all voices that requests may name, aliases included."""
        listed = [] if self.library is None else await asyncio.to_thread(self._access_library, self.library.list_voices)
        listed_ids = {voice.id for voice in listed}
        aliases = [
            ListedVoice(name, name, f"alias of {voice}")
            for name, voice in sorted(self.config.voice_aliases.items())
            if name not in listed_ids
        ]
        return listed + aliases

    async def add_voice(self, name: str, content: bytes, transcript: str | None, consent: str) -> list[str]:
        """Add a recording to the library; return warnings about its quality.

        Args:
            content: the recording's file.
            transcript: what is said in the recording, word by word.
            consent: who is speaking, and their agreement to this use of their voice.

        Raises:
            ApiError: the recording cannot be added.
        """
        library = self._require_library()
        check_name(name)
        if not consent.strip():
            raise BadRequest(
                "consent: state who is speaking and that they agreed to the use of their voice", param="consent"
            )
        for param, text, max_chars in (
            ("consent", consent, _CONSENT_CHARS),
            ("transcript", transcript or "", _TRANSCRIPT_CHARS),
        ):
            if len(text) > max_chars:
                raise BadRequest(f"{param}: {len(text)} characters; at most {max_chars} are allowed", param=param)
        transcript = (transcript or "").strip() or None
        recording = await asyncio.to_thread(check_reference, content, self.limits, "audio_sample")
        flac = await asyncio.to_thread(recording.to_flac)
        await asyncio.to_thread(self._access_library, library.add, name, flac, transcript, consent.strip())
        return await asyncio.to_thread(recording.warnings, transcript)

    async def remove_voice(self, name: str) -> None:
        """Remove a voice from the library.

        Raises:
            NotFound: there is no voice of this name.
        """
        await asyncio.to_thread(self._access_library, self._require_library().remove, name)

    def _access_library(self, method: Any, *arguments: Any) -> Any:
        """Call a method of the library; a storage failure becomes a temporary error."""
        try:
            return method(*arguments)
        except ApiError:
            raise
        except (OSError, ValueError) as error:
            raise ServiceUnavailable(
                "the voice store cannot be reached at the moment", retry_after_s=_MIN_RETRY_S
            ) from error
