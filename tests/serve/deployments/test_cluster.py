"""The endpoint on real Ray Serve with the demo model: behaviour that only shows there."""

import asyncio
import base64
import concurrent.futures
import http.client
import io
import json
import os
import socket
import threading
import time
import urllib.request

import numpy as np
import openai
import psutil
import pytest
import soundfile
import torch

from higgs_model import Script
from higgs_model.audio.writers import to_pcm16
from serve.deployments.config import EndpointConfig
from tests.serve.conftest import recording, wait_for
from tests.serve.deployments.test_load import open_stream
from tests.serve.speech.test_speech import ask

# Ray's own: an old pydantic style, sockets and processes that end with the cluster.
pytestmark = [
    # One cluster is enough.
    pytest.mark.xdist_group("cluster"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SLOTS, QUEUED = 3, 2
ROW = {"text": "[SPEAKER0] Good morning.\n[SPEAKER1] Did you sleep well?", "seed": 11, "max_frames": 60}
LONG = {"input": "This goes on. " * 60, "max_frames": 700, "response_format": "pcm"}


def config(folder, **changes):
    return EndpointConfig(
        model="demo",
        voices=str(folder),
        max_batch=SLOTS,
        max_queued=QUEUED,
        cpus_per_replica=0.5,
        request_timeout_s=60,
        **changes,
    )


class Cluster:
    """A Ray instance with one Serve application."""

    def __init__(self, folder):
        import ray
        from ray import serve

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=100 << 20,
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=False,
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        self.url = f"http://127.0.0.1:{port}"
        self.conditions = []
        watch = threading.Thread(target=self._watch, daemon=True)
        watch.start()
        self.deploy()
        watch.join(30)

    def deploy(self, **changes):
        from ray import serve

        from serve.app import build
        from serve.deployments.replica import load_synthesizer

        serve.run(build(config(self.folder, **changes), load_synthesizer))

    def _watch(self):
        """What the health path says while the application comes up."""
        end = time.monotonic() + 60
        while time.monotonic() < end and "ready" not in self.conditions:
            try:
                status, _, body = ask(self.url, "/healthz")
                self.conditions.append(json.loads(body).get("status", status))
            except (OSError, ValueError):
                pass
            time.sleep(0.2)

    def metrics(self):
        from ray import serve

        return serve.get_deployment_handle("Synthesizer", "default").metrics.remote().result(timeout_s=30)

    def close(self):
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voices")
    (folder / "ann.wav").write_bytes(recording())
    (folder / "ann.txt").write_text("This is what I sound like, more or less.")
    found = Cluster(folder)
    yield found
    found.close()


def idle(cluster):
    numbers = cluster.metrics()
    return numbers["running"] == numbers["queued"] == numbers["kv_blocks_used"] == 0


def wait_for_export(wanted):
    """Until Ray's exporter has all of it; what is missing is named. Processes report every few seconds, and the
    exporter itself starts when the machine has time for it, which is all that the limit is for.
    """
    import ray

    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    end = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                text = answer.read().decode()
            missing = [one for one in wanted if one not in text]
        except OSError as error:
            missing = [f"an answer from {url}: {error}"]
        if not missing:
            return
        assert time.monotonic() < end, f"not exported: {missing}"
        time.sleep(0.5)


def test_health_distinguishes_loading_from_ready(cluster):
    assert cluster.conditions[-1] == "ready"
    assert set(cluster.conditions) - {"ready"} <= {"loading", 404}
    assert "loading" in cluster.conditions


def test_audio_is_bit_identical_to_a_batch_job(cluster):
    """Both streams compared with the samples of a batch job's worker, which has two threads."""
    from higgs_model.synthesizer import SynthesisSettings, Synthesizer

    torch.set_num_threads(2)
    try:
        alone = Synthesizer.from_pretrained("demo", voices=cluster.folder, device="cpu")
        once = Synthesizer.from_pretrained("demo", settings=SynthesisSettings(attempts=1), device="cpu")
        checked = alone.synthesize(Script.model_validate({"id": "x", "voices": {"SPEAKER0": "ann"}} | ROW))
        live = once.synthesize(Script.model_validate({"id": "x", "text": "Hello there.", "seed": 3, "max_frames": 90}))
        for one in (alone, once):
            one.close()
    finally:
        torch.set_num_threads(1)
    row = ROW | {"voices": {"SPEAKER0": "ann"}, "response_format": "pcm"}
    bodies = [("/v1/audio/scripts", row)] * 2 + [
        ("/v1/audio/speech", {"input": "Hello there.", "seed": 3, "max_frames": 90, "response_format": "pcm"})
    ]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda one: ask(cluster.url, *one), bodies))
    assert [status for status, _, _ in answers] == [200, 200, 200]
    assert answers[0][2] == answers[1][2] == to_pcm16(checked.waveform).tobytes()
    assert answers[2][2] == to_pcm16(live.waveform).tobytes()


def test_audio_is_streamed_while_it_is_generated(cluster):
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="alloy", input=LONG["input"], response_format="wav", extra_body={"max_frames": 500}
    ) as answer:
        arrivals = [(time.monotonic(), len(part)) for part in answer.iter_bytes(4096)]
        assert answer.headers["x-request-id"]
    assert arrivals[0][0] < arrivals[-1][0] - 0.2
    spoken = client.audio.speech.create(model="tts-1", voice="ann", input="Hello.", extra_body={"max_frames": 50})
    assert len(soundfile.read(io.BytesIO(spoken.read()))[0]) > 10_000


def test_large_messages_pass(cluster):
    """Larger than gRPC's default message limit."""
    paused = {"input": "Well. [pause:100s] Well.", "seed": 4, "max_frames": 20, "response_format": "pcm"}
    status, _, body = ask(cluster.url, "/v1/audio/speech", paused)
    assert status == 200
    assert len(body) > 100 * 24_000 * 2
    large = base64.b64encode(recording(55, 48_000)).decode()
    assert len(large) > 6 << 20
    cloned = {
        "input": "Well.",
        "max_frames": 20,
        "ref_audio": large,
        "ref_text": "What is said.",
        "response_format": "pcm",
    }
    assert ask(cluster.url, "/v1/audio/speech", cloned)[0] == 200


def test_disconnecting_frees_slot_and_blocks_within_a_second(cluster):
    for body in (LONG, LONG | {"stream_format": "sse", "response_format": "mp3"}):
        before = cluster.metrics()["finished_cancelled"]
        with open_stream(cluster.url, body):
            assert cluster.metrics()["running"] == 1
        wait_for(lambda: idle(cluster), 5)
        assert cluster.metrics()["finished_cancelled"] == before + 1


def test_full_queue_returns_429_and_drains(cluster):
    """More concurrent clients than slots and queue places together."""
    outcomes = []

    def client(number):
        status, headers, body = ask(cluster.url, "/v1/audio/speech", LONG | {"seed": number, "max_frames": 300})
        outcomes.append((status, headers.get("retry-after"), len(body)))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(SLOTS + QUEUED + 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    statuses = [status for status, _, _ in outcomes]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= SLOTS + QUEUED
    assert all(int(after) >= 1 for status, after, _ in outcomes if status == 429)
    wait_for(lambda: idle(cluster), 5)
    wait_for_export(['outcome="queue_full"'])


def test_half_of_the_clients_disconnect(cluster):
    host, port = cluster.url.removeprefix("http://").split(":")
    body = json.dumps(LONG | {"input": "Well then. " * 5, "max_frames": 60}).encode()
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    statuses = []

    async def client(number):
        for turn in range(3):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(head.encode() + body)
            if (number + turn) % 2:
                await asyncio.sleep((number % 7) / 14)
            else:
                statuses.append(int((await reader.read()).split()[1]))
            writer.close()

    async def everybody():
        await asyncio.gather(*(client(number) for number in range(12)))

    asyncio.run(everybody())
    assert set(statuses) <= {200, 429}
    assert 200 in statuses
    wait_for(lambda: idle(cluster), 10)


def test_ray_exports_metrics(cluster):
    assert ask(cluster.url, "/v1/audio/speech", {"input": "Well.", "max_frames": 20})[0] == 200
    with open_stream(cluster.url, LONG):
        pass
    wait_for(lambda: idle(cluster), 10)
    names = ("requests_total", "audio_seconds_total", "first_audio_seconds_bucket", "engine_decode_frames")
    wait_for_export([*(f"ray_higgs_{name}" for name in names), 'outcome="ok"', 'outcome="gone"'])


def test_killed_replica_aborts_its_streams_and_is_replaced(cluster):
    """A client must not take a partial recording for a complete one."""
    processes = psutil.Process().children(recursive=True)
    (replica,) = [one for one in processes if "ServeReplica:default:Synthesizer" in " ".join(one.cmdline())]
    connection = http.client.HTTPConnection(cluster.url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/v1/audio/speech", json.dumps(LONG))
    with connection.getresponse() as answer:
        answer.read(1000)
        replica.kill()
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            answer.read()
    connection.close()

    def served():
        status, headers, _ = ask(cluster.url, "/v1/audio/speech", LONG | {"max_frames": 30})
        assert status in (200, 429, 503)
        return status == 200

    assert wait_for(served, 90)


def test_stream_ends_during_a_rolling_update(cluster):
    """The application is deployed again."""
    whole = ask(cluster.url, "/v1/audio/speech", LONG)[2]
    connection = http.client.HTTPConnection(cluster.url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/v1/audio/speech", json.dumps(LONG))
    with connection.getresponse() as answer:
        first = answer.read(1000)
        deployed = threading.Thread(target=cluster.deploy, kwargs={"seed": 1})
        deployed.start()
        rest = answer.read()
        deployed.join(60)
    connection.close()
    assert first + rest == whole
    other = ask(cluster.url, "/v1/audio/speech", LONG | {"max_frames": 60})[2]
    assert np.frombuffer(other[:1000], np.int16).tobytes() != whole[:1000]


def test_autoscaling_adds_and_removes_a_replica(cluster):
    from ray import serve

    def running():
        states = serve.status().applications["default"].deployments["Synthesizer"].replica_states
        return states.get("RUNNING", 0)

    cluster.deploy(max_replicas=2, upscale_delay_s=1, downscale_delay_s=5)
    assert running() == 1
    there, statuses = threading.Event(), []

    def client(number):
        while not there.is_set():
            status, _, _ = ask(cluster.url, "/v1/audio/speech", LONG | {"seed": number, "max_frames": 200})
            statuses.append(status)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(SLOTS + QUEUED)]
    for one in clients:
        one.start()
    try:
        assert wait_for(lambda: running() == 2, 120)
    finally:
        there.set()
        for one in clients:
            one.join(60)
    assert set(statuses) == {200}
    assert wait_for(lambda: running() == 1, 120)
    assert ask(cluster.url, "/v1/audio/speech", LONG | {"max_frames": 10})[0] == 200
