"""The endpoint's application over real HTTP on the loopback, without Ray, with a synthesizer that needs no model."""

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
from serve.deployments.config import EndpointConfig
from serve.http.routes import create_app
from serve.http.security import KeyRing
from serve.speech.endpoint import Endpoint
from serve.speech.synthesis import Speaker
from serve.voices.voice_library import VoiceLibrary
from serve.voices.voice_store import open_store


def recording(seconds=4.0, rate=24_000, channels=1, file_format="WAV", subtype="PCM_16"):
    """A tone that comes and goes, as a file."""
    at = np.arange(round(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * 220 * at) * (0.5 + 0.5 * np.sin(9 * at))
    file = io.BytesIO()
    soundfile.write(file, np.stack([tone] * channels, axis=1), rate, format=file_format, subtype=subtype)
    return file.getvalue()


class LocalBackend:
    """One synthesizer in this process; as many jobs as it has slots are spoken at the same time, the others wait."""

    def __init__(self, speaker, slots):
        self.speaker, self._slots = speaker, slots
        self.waiting = self.speaking = 0
        self.state = "ready"
        self.jobs = []
        self._free = None

    def slots(self):
        return self._slots

    async def speak(self, job):
        self._free = self._free or asyncio.Semaphore(self._slots)
        self.jobs.append(job)
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.speaking += 1
        try:
            async with contextlib.aclosing(self.speaker.answer(job)) as events:
                async for event in events:
                    yield event
        finally:
            self.speaking -= 1
            self._free.release()

    async def condition(self):
        return self.state


class Server:
    """An application on a port of its own."""

    def __init__(self, backend, endpoint, keys=()):
        import hashlib

        self.backend, self.endpoint = backend, endpoint
        digests = frozenset(hashlib.sha256(key.encode()).digest() for key in keys)
        app = create_app(endpoint, KeyRing(digests))
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
def serve_local():
    """`serve_local(speaks=…, keys=…, **settings)`: a server; all are closed at the end."""
    servers = []

    def start(speaks=None, keys=(), fetcher=None, slots=4, **settings):
        config = EndpointConfig(**settings)
        library = None if config.voices is None else VoiceLibrary(open_store(config.voices))
        backend = LocalBackend(Speaker(speaks or FakeSynthesizer(), library, config.seed), slots)
        server = Server(backend, Endpoint(config, backend, library, fetcher=fetcher), keys)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def server(serve_local, library_folder):
    """The one that most tests ask."""
    return serve_local(voices=str(library_folder), voice_aliases={"nova": "ann"})


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise TimeoutError
