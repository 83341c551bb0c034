"""What the endpoint does, without HTTP: requests to answers, voices in and out.

It owns the order of the checks: text and fields first, then recordings, then a place in the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from higgs_model.script.script import Script
from serve.deployments.config import EndpointConfig
from serve.http.background import aside, is_short
from serve.http.errors import ApiError, BadRequest, Busy, NotReady
from serve.http.request_log import RequestFacts, RequestMetrics
from serve.http.request_models import OPENAI_VOICES, Delivery, SpeechRequest, read_script
from serve.speech.events import Backend, Condition, SpeakJob
from serve.speech.streaming import Answer, open_answer
from serve.voices.reference_audio import Limits, check, decode_text
from serve.voices.reference_download import Fetcher
from serve.voices.voice_library import ListedVoice, VoiceLibrary, check_name

_URL = ("http://", "https://", "ftp://", "file://", "s3://")
_BROUGHT = "ref_audio"
"""In a row, for the recording that travels beside it."""
_CONSENT_CHARS = 4000
_TRANSCRIPT_CHARS = 4000
_RETRY_FIRST_S, _RETRY_MOST_S = 2, 60


class Endpoint:
    """One HTTP worker's."""

    def __init__(
        self,
        config: EndpointConfig,
        backend: Backend,
        library: VoiceLibrary | None = None,
        metrics: RequestMetrics | None = None,
        fetcher: Fetcher | None = None,
    ) -> None:
        self.config, self.backend, self.library = config, backend, library
        self.metrics = metrics or RequestMetrics()
        self.limits = Limits(config.max_reference_bytes, config.max_reference_s)
        self._fetcher = fetcher or Fetcher(config.reference_urls, config.max_reference_bytes)
        self._waiting = self._speaking = 0
        self._usual_s = float(_RETRY_FIRST_S)

    # ------------------------------------------------------------------ speech

    async def speech(self, request: SpeechRequest, recording: bytes | None, facts: RequestFacts) -> Answer:
        """One text, one voice."""
        self._check_length(request.input, self.config.max_input_chars, "input")
        row = request.row(facts.request_id)
        warnings: tuple[str, ...] = ()
        if request.ref_audio is None and recording is None:
            row["voice"], warnings = await self._chosen(request.voice)
        else:
            row.pop("voice", None)
        if request.instructions:
            warnings += ("instructions are not used; describe the voice or the scene instead",)
        try:
            return await self._answer(row, request.ref_audio, recording, request, facts, warnings)
        except BadRequest as error:
            if error.param == "text":
                error.param, error.message = "input", error.message.replace("text: ", "input: ", 1)
            raise

    async def script(
        self, row: Mapping[str, Any], recording: bytes | None, delivery: Delivery, facts: RequestFacts
    ) -> Answer:
        """A manifest's row."""
        row = {"id": facts.request_id} | {name: value for name, value in row.items() if value is not None}
        if isinstance(row.get("voice"), dict):
            row["voice"] = row["voice"].get("id")
        brought = row.pop("ref_audio", None)
        if brought is not None and not isinstance(brought, str):
            raise BadRequest(
                "ref_audio: send the recording as base64, a data URI or a multipart file", param="ref_audio"
            )
        return await self._answer(row, brought, recording, delivery, facts, ())

    async def _answer(
        self,
        row: Mapping[str, Any],
        brought: str | None,
        recording: bytes | None,
        delivery: Delivery,
        facts: RequestFacts,
        warnings: tuple[str, ...],
    ) -> Answer:
        until_s = asyncio.get_running_loop().time() + self.config.request_timeout_s - facts.elapsed_s()
        has_recording = brought is not None or recording is not None
        named = dict(row) | ({"ref_audio": _BROUGHT} if has_recording else {})
        script = await aside(self._script, named, at_once=is_short(row))
        facts.characters, facts.format = len(script.tagged_text()), delivery.response_format
        facts.voice = _BROUGHT if has_recording else script.voice
        reference = await self._reference(brought, recording)
        plain = script.model_dump(exclude_none=True, exclude={"ref_audio"})
        if reference is not None:
            plain["ref_audio"] = _BROUGHT
        job = SpeakJob(facts.request_id, plain, reference, delivery.live)
        async with self._place():
            return await open_answer(self.backend, job, delivery, facts, warnings, until_s)

    def _script(self, row: dict[str, Any]) -> Script:
        script = read_script(row)
        self._check_length(script.tagged_text(), self.config.max_script_chars, "text")
        aliases = self.config.voice_aliases
        changed: dict[str, Any] = {}
        if script.voice in aliases:
            changed["voice"] = aliases[script.voice]
        if script.voices is not None:
            changed["voices"] = {speaker: aliases.get(voice, voice) for speaker, voice in script.voices.items()}
        return script.model_copy(update=changed) if changed else script

    async def _chosen(self, voice: str | None) -> tuple[str | None, tuple[str, ...]]:
        """The voice of a request, and what its author should know."""
        default = self.config.default_voice
        if voice is None or not voice.strip():
            return default, ()
        if voice in self.config.voice_aliases or voice not in OPENAI_VOICES:
            return voice, ()
        if self.library is not None and voice in await asyncio.to_thread(lambda: self._voices().voices().names()):
            return voice, ()
        instead = f"{default!r} speaks" if default else "the model picks a voice"
        return default, (f"there is no voice {voice!r} here, so {instead} instead",)

    async def _reference(self, brought: str | None, recording: bytes | None) -> bytes | None:
        if brought is not None and brought.startswith(_URL):
            recording = await asyncio.to_thread(self._fetcher.fetch, brought)
        elif brought is not None:
            recording = await asyncio.to_thread(decode_text, brought, self.limits)
        if recording is None:
            return None
        return (await asyncio.to_thread(check, recording, self.limits)).content

    @staticmethod
    def _check_length(text: str, most: int, param: str) -> None:
        if len(text) > most:
            raise BadRequest(
                f"{param}: {len(text)} characters; at most {most} are spoken in one request. Longer scripts go to "
                "/v1/audio/scripts or to a batch job",
                param=param,
            )

    # ------------------------------------------------------------------ load

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """A request waits, until its first samples are here.

        Raises:
            Busy: all slots speak, and as many wait as may.
        """
        slots = -(-self.backend.slots() // self.config.ingress_replicas)
        if self._waiting + self._speaking >= slots + self.config.max_queued:
            raise Busy("all slots speak and the queue is full; ask again", retry_after_s=self.retry_after_s())
        self._waiting += 1
        self._count()
        try:
            yield
        finally:
            self._waiting -= 1
            self._count()

    @contextlib.contextmanager
    def speaking(self, facts: RequestFacts) -> Iterator[None]:
        """A request is being spoken."""
        self._speaking += 1
        self._count()
        try:
            yield
        finally:
            self._speaking -= 1
            self._usual_s += 0.1 * (facts.elapsed_s() - self._usual_s)
            self._count()

    def _count(self) -> None:
        self.metrics.under_way(self._waiting, self._speaking)

    def retry_after_s(self) -> int:
        """When somebody who was turned away should come again: a request usually takes as long."""
        return max(1, min(_RETRY_MOST_S, math.ceil(self._usual_s)))

    async def condition(self) -> Condition:
        """Whether anybody can speak."""
        return await self.backend.condition()

    # ------------------------------------------------------------------ voices

    def _voices(self) -> VoiceLibrary:
        if self.library is None:
            raise BadRequest("this endpoint keeps no voices; start it with voices=FOLDER or voices=s3://BUCKET/PREFIX")
        return self.library

    async def list_voices(self) -> list[ListedVoice]:
        """All that may be named."""
        listed = [] if self.library is None else await asyncio.to_thread(self._stored, self.library.listing)
        known = {voice.id for voice in listed}
        aliases = [
            ListedVoice(name, name, f"the same as {voice}")
            for name, voice in sorted(self.config.voice_aliases.items())
            if name not in known
        ]
        return listed + aliases

    async def add_voice(self, name: str, content: bytes, transcript: str | None, consent: str) -> list[str]:
        """Keep a recording, and give its warnings.

        Raises:
            ApiError: it cannot be kept.
        """
        library = self._voices()
        check_name(name)
        if not consent.strip():
            raise BadRequest("consent: say who speaks and that they agreed to the use of their voice", param="consent")
        for param, text, most in (
            ("consent", consent, _CONSENT_CHARS),
            ("transcript", transcript or "", _TRANSCRIPT_CHARS),
        ):
            if len(text) > most:
                raise BadRequest(f"{param}: {len(text)} characters; at most {most}", param=param)
        said = (transcript or "").strip() or None
        checked = await asyncio.to_thread(check, content, self.limits, "audio_sample")
        flac = await asyncio.to_thread(checked.flac)
        await asyncio.to_thread(self._stored, library.add, name, flac, said, consent.strip())
        return await asyncio.to_thread(checked.warnings, said)

    async def remove_voice(self, name: str) -> None:
        """Forget a voice.

        Raises:
            NotFound: there is none.
        """
        await asyncio.to_thread(self._stored, self._voices().remove, name)

    def _stored(self, act: Any, *arguments: Any) -> Any:
        try:
            return act(*arguments)
        except ApiError:
            raise
        except (OSError, ValueError) as error:
            raise NotReady("the voice store cannot be reached now", retry_after_s=_RETRY_FIRST_S) from error
