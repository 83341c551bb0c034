"""Load: a full queue, disconnecting clients, timeouts, and failures after the response has started."""

import asyncio
import contextlib
import http.client
import json
import threading

import pytest

from higgs_model.synthesizer.fake import FakeSynthesizer
from tests.serve.conftest import wait_for
from tests.serve.speech.test_speech import ask

LONG = {"input": "This is a sentence of some length. " * 20, "response_format": "pcm"}


@contextlib.contextmanager
def open_stream(url, body, path="/v1/audio/speech"):
    """Open a streaming response; leaving the context disconnects."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body))
        with connection.getresponse() as answer:
            assert answer.status == 200
            assert answer.read(1000)
            yield answer


class BrokenOff(Exception):
    """The response ended prematurely."""


def read_all(answer):
    """Read a response to its end."""
    try:
        return answer.read()
    except (http.client.HTTPException, ConnectionError) as error:
        raise BrokenOff from error


def test_full_queue_returns_retry_after(serve_local):
    server = serve_local(FakeSynthesizer(pace=0.5), slots=1, max_queued=1)
    waiting = threading.Thread(target=ask, args=(server.url, "/v1/audio/speech", {"input": "Hello."}))
    with open_stream(server.url, LONG):
        waiting.start()
        wait_for(lambda: server.backend.waiting == 1)
        for stream_format in ("audio", "sse"):
            status, headers, answer = ask(server.url, "/v1/audio/speech", LONG | {"stream_format": stream_format})
            assert status == 429
            assert json.loads(answer)["error"]["code"] == "queue_full"
            assert 1 <= int(headers["retry-after"]) <= 60
        # What costs nothing is answered all the same.
        assert ask(server.url, "/healthz")[0] == 200
    waiting.join(20)
    assert not waiting.is_alive()


@pytest.mark.parametrize("stream_format", ["audio", "sse"])
@pytest.mark.parametrize("response_format", ["pcm", "mp3"])
def test_disconnecting_frees_a_slot_within_a_second(serve_local, stream_format, response_format):
    server = serve_local(FakeSynthesizer(pace=0.3))
    with open_stream(server.url, LONG | {"stream_format": stream_format, "response_format": response_format}):
        assert server.backend.running == 1
    wait_for(lambda: server.backend.running == 0, 1.0 if response_format == "pcm" else 2.0)


def test_request_times_out(serve_local):
    server = serve_local(FakeSynthesizer(pace=0.3), request_timeout_s=0.8)
    with open_stream(server.url, LONG) as answer, pytest.raises(BrokenOff):
        read_all(answer)
    status, _, body = ask(server.url, "/v1/audio/scripts", {"text": LONG["input"]})
    assert status == 504
    assert json.loads(body)["error"]["code"] == "timeout"


class Breaking(FakeSynthesizer):
    """Fails after some audio."""

    async def stream(self, plan, **options):
        count = 0
        async for piece in super().stream(plan, **options):
            yield piece
            count += 1
            if "at once" in plan.script.text or count == 2:
                raise RuntimeError("/secret/path/of/the/server")


def test_failure_after_the_start_aborts_the_stream(serve_local):
    server = serve_local(Breaking())
    with open_stream(server.url, LONG) as answer, pytest.raises(BrokenOff):
        read_all(answer)
    _, _, body = ask(server.url, "/v1/audio/speech", LONG | {"stream_format": "sse"})
    last = json.loads(body.decode().strip().splitlines()[-1][6:])
    assert last["type"] == "error"
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in body.decode()
    wait_for(lambda: server.backend.running == 0)


def test_failure_before_the_start_is_an_error_response(serve_local):
    class Broken(FakeSynthesizer):
        async def stream(self, plan, **options):
            raise RuntimeError("/secret/path")
            yield

    status, _, body = ask(serve_local(Broken()).url, "/v1/audio/speech", {"input": "Hello."})
    assert status == 500
    assert "secret" not in body.decode()


def test_failed_engine_is_reported_to_serve_and_the_client(serve_local):
    from higgs_model.engine.loop import EngineStopped

    class Stopped(FakeSynthesizer):
        async def stream(self, plan, **options):
            raise EngineStopped("out of memory")
            yield

    server = serve_local(Stopped())
    status, headers, _ = ask(server.url, "/v1/audio/speech", {"input": "Hello."})
    assert status == 503
    assert int(headers["retry-after"]) > 0
    assert isinstance(server.backend.synthesizer.engine_error, EngineStopped)


@pytest.mark.parametrize(("state", "status"), [("ready", 200), ("loading", 503), ("broken", 503)])
def test_health_status_codes(serve_local, state, status):
    server = serve_local()
    server.backend.state = state
    answered, _, body = ask(server.url, "/healthz")
    assert (answered, json.loads(body)) == (status, {"status": state})


def test_many_clients_half_of_which_disconnect(serve_local):
    """Every client gets audio or a 429, and no resource is leaked."""
    server = serve_local(FakeSynthesizer(pace=0.02), slots=8, max_queued=8)
    host, port = server.url.removeprefix("http://").split(":")
    outcomes = []

    async def client(number):
        for turn in range(4):
            body = json.dumps({"input": "A sentence to be said. " * 6, "response_format": "pcm"}).encode()
            reader, writer = await asyncio.open_connection(host, int(port))
            head = (
                f"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            writer.write(head.encode() + body)
            try:
                if (number + turn) % 2:
                    await asyncio.sleep((number % 10) / 30)
                    outcomes.append("left")
                    continue
                outcomes.append(int((await reader.read()).split()[1]))
            finally:
                writer.close()

    async def all_of_them():
        await asyncio.gather(*(client(number) for number in range(40)))

    asyncio.run(all_of_them())
    assert set(outcomes) <= {200, 429, "left"}
    assert outcomes.count(200) > 0
    wait_for(lambda: server.backend.running == server.backend.waiting == 0, 5)
    assert server.backend.synthesizer.synthesizer.metrics()["audio_s"] > 0
