"""Load: a full queue, disconnecting clients, timeouts, and failures after the response has started."""

import asyncio
import contextlib
import http.client
import json
import threading

import pytest

from higgs_model.synthesizer.fake import FakeSynthesizer
from tests.serve.conftest import wait_for
from tests.serve.speech.test_speech import send_request

LONG = {"input": "This is a sentence of some length. " * 20, "response_format": "pcm"}


@contextlib.contextmanager
def open_stream(url, body, path="/v1/audio/speech"):
    """Open a streaming response; leaving the context disconnects."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body))
        with connection.getresponse() as response:
            assert response.status == 200
            assert response.read(1000)
            yield response


class PrematureEnd(Exception):
    """The response ended before it was complete."""


def read_all(response):
    """Return the rest of a response; raise PrematureEnd if it is aborted."""
    try:
        return response.read()
    except (http.client.HTTPException, ConnectionError) as error:
        raise PrematureEnd from error


def test_full_queue_returns_retry_after(start_server):
    server = start_server(FakeSynthesizer(pace=0.5), slots=1, max_queued=1)
    queued_client = threading.Thread(target=send_request, args=(server.url, "/v1/audio/speech", {"input": "Hello."}))
    with open_stream(server.url, LONG):
        queued_client.start()
        wait_for(lambda: server.backend.waiting == 1)
        for stream_format in ("audio", "sse"):
            status, headers, response = send_request(
                server.url, "/v1/audio/speech", LONG | {"stream_format": stream_format}
            )
            assert status == 429
            assert json.loads(response)["error"]["code"] == "queue_full"
            assert 1 <= int(headers["retry-after"]) <= 60
        # Requests that need no slot still succeed.
        assert send_request(server.url, "/healthz")[0] == 200
    queued_client.join(20)
    assert not queued_client.is_alive()


@pytest.mark.parametrize("stream_format", ["audio", "sse"])
@pytest.mark.parametrize("response_format", ["pcm", "mp3"])
def test_disconnecting_frees_the_slot_within_two_seconds(start_server, stream_format, response_format):
    server = start_server(FakeSynthesizer(pace=0.3))
    with open_stream(server.url, LONG | {"stream_format": stream_format, "response_format": response_format}):
        assert server.backend.running == 1
    wait_for(lambda: server.backend.running == 0, 1.0 if response_format == "pcm" else 2.0)


def test_request_times_out(start_server):
    server = start_server(FakeSynthesizer(pace=0.3), request_timeout_s=0.8)
    with open_stream(server.url, LONG) as response, pytest.raises(PrematureEnd):
        read_all(response)
    status, _, body = send_request(server.url, "/v1/audio/scripts", {"text": LONG["input"]})
    assert status == 504
    assert json.loads(body)["error"]["code"] == "timeout"


class FailingSynthesizer(FakeSynthesizer):
    """Fails after its second piece of audio, or after the first one for texts that contain "at once"."""

    async def stream(self, plan, **options):
        count = 0
        async for piece in super().stream(plan, **options):
            yield piece
            count += 1
            if "at once" in plan.script.text or count == 2:
                raise RuntimeError("/secret/path/of/the/server")


def test_failure_after_the_start_aborts_the_stream(start_server):
    server = start_server(FailingSynthesizer())
    with open_stream(server.url, LONG) as response, pytest.raises(PrematureEnd):
        read_all(response)
    _, _, body = send_request(server.url, "/v1/audio/speech", LONG | {"stream_format": "sse"})
    last = json.loads(body.decode().strip().splitlines()[-1][6:])
    assert last["type"] == "error"
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in body.decode()
    wait_for(lambda: server.backend.running == 0)


def test_failure_before_the_start_is_an_error_response(start_server):
    class Failing(FakeSynthesizer):
        async def stream(self, plan, **options):
            raise RuntimeError("/secret/path")
            yield

    status, _, body = send_request(start_server(Failing()).url, "/v1/audio/speech", {"input": "Hello."})
    assert status == 500
    assert "secret" not in body.decode()


def test_failed_engine_is_reported_to_serve_and_the_client(start_server):
    from higgs_model.engine.loop import EngineStopped

    class Stopped(FakeSynthesizer):
        async def stream(self, plan, **options):
            raise EngineStopped("out of memory")
            yield

    server = start_server(Stopped())
    status, headers, _ = send_request(server.url, "/v1/audio/speech", {"input": "Hello."})
    assert status == 503
    assert int(headers["retry-after"]) > 0
    assert isinstance(server.backend.synthesizer.engine_error, EngineStopped)


@pytest.mark.parametrize(("health", "status"), [("ready", 200), ("loading", 503), ("broken", 503)])
def test_health_maps_to_status_codes(start_server, health, status):
    server = start_server()
    server.backend.status = health
    actual_status, _, body = send_request(server.url, "/healthz")
    assert (actual_status, json.loads(body)) == (status, {"status": health})


def test_many_clients_half_of_which_disconnect(start_server):
    """Every client gets audio or a 429, and no resource is leaked."""
    server = start_server(FakeSynthesizer(pace=0.02), slots=8, max_queued=8)
    host, port = server.url.removeprefix("http://").split(":")
    outcomes = []

    async def client(number):
        for attempt in range(4):
            body = json.dumps({"input": "A sentence to be said. " * 6, "response_format": "pcm"}).encode()
            reader, writer = await asyncio.open_connection(host, int(port))
            headers = (
                f"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            writer.write(headers.encode() + body)
            try:
                if (number + attempt) % 2:
                    await asyncio.sleep((number % 10) / 30)
                    outcomes.append("disconnected")
                    continue
                outcomes.append(int((await reader.read()).split()[1]))
            finally:
                writer.close()

    async def run_clients():
        await asyncio.gather(*(client(number) for number in range(40)))

    asyncio.run(run_clients())
    assert set(outcomes) <= {200, 429, "disconnected"}
    assert outcomes.count(200) > 0
    wait_for(lambda: server.backend.running == server.backend.waiting == 0, 5)
    assert server.backend.synthesizer.synthesizer.metrics()["audio_s"] > 0
