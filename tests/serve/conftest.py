"""Fixtures: the endpoint over HTTP on the loopback interface, without Ray, with a synthesizer that needs no model."""

import asyncio
import contextlib
import io
import socket
import threading
import time

import numpy as np
import pytest
import soundfile
import uvicorn

from higgs_model.synthesizer.fake import FakeSynthesizer
from serve.deployments.settings import EndpointSettings
from serve.http.routes import create_app
from serve.http.security import ApiKeys
from serve.speech.service import SpeechService
from serve.speech.synthesis import RequestSynthesizer
from serve.voices.voice_library import VoiceLibrary
from serve.voices.voice_store import open_voice_store


def recording(seconds=4.0, rate=24_000, channels=1, file_format="WAV", subtype="PCM_16"):
    """Return the content of an audio file with an amplitude-modulated tone."""
    times_s = np.arange(round(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * 220 * times_s) * (0.5 + 0.5 * np.sin(9 * times_s))
    file = io.BytesIO()
    soundfile.write(file, np.stack([tone] * channels, axis=1), rate, format=file_format, subtype=subtype)
    return file.getvalue()


class LocalBackend:
    """A backend with one synthesizer in this process and a limited number of slots."""

    def __init__(self, synthesizer, slots):
        self.synthesizer, self._slots = synthesizer, slots
        self.waiting = self.running = 0
        self.status = "ready"
        self.requests = []
        self._free_slots = None

    def slots(self):
        return self._slots

    async def synthesize(self, request):
        self._free_slots = self._free_slots or asyncio.Semaphore(self._slots)
        self.requests.append(request)
        self.waiting += 1
        try:
            await self._free_slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            async with contextlib.aclosing(self.synthesizer.stream(request)) as events:
                async for event in events:
                    yield event
        finally:
            self.running -= 1
            self._free_slots.release()

    async def health(self):
        return self.status


class Server:
    """Serves an endpoint on a free port."""

    def __init__(self, backend, endpoint, keys=()):
        import hashlib

        self.backend, self.endpoint = backend, endpoint
        digests = frozenset(hashlib.sha256(key.encode()).digest() for key in keys)
        app = create_app(endpoint, ApiKeys(digests))
        self._socket = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def close(self):
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()


@pytest.fixture(scope="session")
def library_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voices")
    (folder / "ann.wav").write_bytes(recording())
    (folder / "ann.txt").write_text("This is what I sound like, more or less.")
    (folder / "profile.yaml").write_text("profiles: {deep: a deep calm voice}")
    return folder


@pytest.fixture(scope="session")
def start_server():
    """Return a function that starts a server with any synthesizer, API keys and settings; close all at the end."""
    servers = []

    def start(synthesizer=None, keys=(), downloader=None, slots=4, **settings):
        config = EndpointSettings(**settings)
        library = None if config.voices is None else VoiceLibrary(open_voice_store(config.voices))
        backend = LocalBackend(RequestSynthesizer(synthesizer or FakeSynthesizer(), library, config.seed), slots)
        server = Server(backend, SpeechService(config, backend, library, downloader=downloader), keys)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def server(start_server, library_folder):
    """A server with a voice library, shared by most tests."""
    return start_server(voices=str(library_folder), voice_aliases={"nova": "ann"})


def wait_for(condition, seconds=20):
    """Return the first true result of `condition`; raise TimeoutError if there is none within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.01)
    raise TimeoutError
