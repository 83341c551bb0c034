"""The endpoint on Ray Serve with the demo model: behaviour that depends on a cluster."""

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
from serve.deployments.settings import EndpointSettings
from tests.serve.conftest import recording, wait_for
from tests.serve.deployments.test_load import open_stream
from tests.serve.speech.test_speech import send_request

pytestmark = [
    # All tests share one cluster.
    pytest.mark.xdist_group("cluster"),
    # Warnings from Ray: deprecated pydantic features, and sockets and processes that end with the cluster.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SLOTS, QUEUED = 3, 2
ROW = {"text": "[SPEAKER0] Good morning.\n[SPEAKER1] Did you sleep well?", "seed": 11, "max_frames": 60}
LONG = {"input": "This goes on. " * 60, "max_frames": 700, "response_format": "pcm"}


def config(folder, **changes):
    return EndpointSettings(
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
        with socket.create_server(("127.0.0.1", 0)) as free_socket:
            port = free_socket.getsockname()[1]
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
        self.health_history = []
        watcher = threading.Thread(target=self._watch_health, daemon=True)
        watcher.start()
        self.deploy()
        watcher.join(30)

    def deploy(self, **changes):
        from ray import serve

        from serve.app import build
        from serve.deployments.replica import load_synthesizer

        serve.run(build(config(self.folder, **changes), load_synthesizer))

    def _watch_health(self):
        """Record the endpoint's health while the application starts."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and "ready" not in self.health_history:
            try:
                status, _, body = send_request(self.url, "/healthz")
                self.health_history.append(json.loads(body).get("status", status))
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
    running = Cluster(folder)
    yield running
    running.close()


def is_idle(cluster):
    metrics = cluster.metrics()
    return metrics["running"] == metrics["queued"] == metrics["kv_blocks_used"] == 0


def wait_for_export(expected):
    """Wait until Ray exports all expected metrics; name the missing ones on failure.

    Processes report every few seconds. The timeout is long because the exporter starts late on a busy machine.
    """
    import ray

    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                text = response.read().decode()
            missing = [metric for metric in expected if metric not in text]
        except OSError as error:
            missing = [f"a response from {url}: {error}"]
        if not missing:
            return
        assert time.monotonic() < deadline, f"not exported: {missing}"
        time.sleep(0.5)


def test_health_distinguishes_loading_from_ready(cluster):
    assert cluster.health_history[-1] == "ready"
    assert set(cluster.health_history) - {"ready"} <= {"loading", 404}
    assert "loading" in cluster.health_history


def test_audio_is_bit_identical_to_a_batch_job(cluster):
    """Compares both routes with the samples of a batch job's worker, which uses two threads."""
    from higgs_model.synthesizer import SynthesisSettings, Synthesizer

    torch.set_num_threads(2)
    try:
        synthesizer = Synthesizer.from_pretrained("demo", voices=cluster.folder, device="cpu")
        single_take = Synthesizer.from_pretrained("demo", settings=SynthesisSettings(attempts=1), device="cpu")
        checked = synthesizer.synthesize(Script.model_validate({"id": "x", "voices": {"SPEAKER0": "ann"}} | ROW))
        live = single_take.synthesize(
            Script.model_validate({"id": "x", "text": "Hello there.", "seed": 3, "max_frames": 90})
        )
        for opened in (synthesizer, single_take):
            opened.close()
    finally:
        torch.set_num_threads(1)
    row = ROW | {"voices": {"SPEAKER0": "ann"}, "response_format": "pcm"}
    requests = [("/v1/audio/scripts", row)] * 2 + [
        ("/v1/audio/speech", {"input": "Hello there.", "seed": 3, "max_frames": 90, "response_format": "pcm"})
    ]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        responses = list(pool.map(lambda request: send_request(cluster.url, *request), requests))
    assert [status for status, _, _ in responses] == [200, 200, 200]
    assert responses[0][2] == responses[1][2] == to_pcm16(checked.waveform).tobytes()
    assert responses[2][2] == to_pcm16(live.waveform).tobytes()


def test_audio_is_streamed_while_it_is_generated(cluster):
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="alloy", input=LONG["input"], response_format="wav", extra_body={"max_frames": 500}
    ) as response:
        arrivals = [(time.monotonic(), len(part)) for part in response.iter_bytes(4096)]
        assert response.headers["x-request-id"]
    assert arrivals[0][0] < arrivals[-1][0] - 0.2
    short = client.audio.speech.create(model="tts-1", voice="ann", input="Hello.", extra_body={"max_frames": 50})
    assert len(soundfile.read(io.BytesIO(short.read()))[0]) > 10_000


def test_messages_may_exceed_grpcs_default_limit(cluster):
    paused = {"input": "Well. [pause:100s] Well.", "seed": 4, "max_frames": 20, "response_format": "pcm"}
    status, _, body = send_request(cluster.url, "/v1/audio/speech", paused)
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
    assert send_request(cluster.url, "/v1/audio/speech", cloned)[0] == 200


def test_disconnecting_frees_slot_and_blocks(cluster):
    for body in (LONG, LONG | {"stream_format": "sse", "response_format": "mp3"}):
        before = cluster.metrics()["finished_cancelled"]
        with open_stream(cluster.url, body):
            assert cluster.metrics()["running"] == 1
        wait_for(lambda: is_idle(cluster), 5)
        assert cluster.metrics()["finished_cancelled"] == before + 1


def test_full_queue_returns_429_and_drains(cluster):
    """Starts more concurrent clients than there are slots and queue places."""
    outcomes = []

    def client(number):
        status, headers, body = send_request(
            cluster.url, "/v1/audio/speech", LONG | {"seed": number, "max_frames": 300}
        )
        outcomes.append((status, headers.get("retry-after"), len(body)))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(SLOTS + QUEUED + 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    statuses = [status for status, _, _ in outcomes]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= SLOTS + QUEUED
    assert all(int(retry_after) >= 1 for status, retry_after, _ in outcomes if status == 429)
    wait_for(lambda: is_idle(cluster), 5)
    wait_for_export(['outcome="queue_full"'])


def test_disconnecting_clients_do_not_disturb_the_others(cluster):
    host, port = cluster.url.removeprefix("http://").split(":")
    body = json.dumps(LONG | {"input": "Well then. " * 5, "max_frames": 60}).encode()
    headers = f"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    statuses = []

    async def client(number):
        for attempt in range(3):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(headers.encode() + body)
            if (number + attempt) % 2:
                await asyncio.sleep((number % 7) / 14)
            else:
                statuses.append(int((await reader.read()).split()[1]))
            writer.close()

    async def run_clients():
        await asyncio.gather(*(client(number) for number in range(12)))

    asyncio.run(run_clients())
    assert set(statuses) <= {200, 429}
    assert 200 in statuses
    wait_for(lambda: is_idle(cluster), 10)


def test_ray_exports_metrics(cluster):
    assert send_request(cluster.url, "/v1/audio/speech", {"input": "Well.", "max_frames": 20})[0] == 200
    with open_stream(cluster.url, LONG):
        pass
    wait_for(lambda: is_idle(cluster), 10)
    names = ("requests_total", "audio_seconds_total", "first_audio_seconds_bucket", "engine_decode_frames")
    wait_for_export([*(f"ray_higgs_{name}" for name in names), 'outcome="ok"', 'outcome="gone"'])


def test_killed_replica_aborts_its_streams_and_is_replaced(cluster):
    """A client must not mistake a partial recording for a complete one."""
    processes = psutil.Process().children(recursive=True)
    (replica,) = [process for process in processes if "ServeReplica:default:Synthesizer" in " ".join(process.cmdline())]
    connection = http.client.HTTPConnection(cluster.url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/v1/audio/speech", json.dumps(LONG))
    with connection.getresponse() as response:
        response.read(1000)
        replica.kill()
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
    connection.close()

    def is_served():
        status, headers, _ = send_request(cluster.url, "/v1/audio/speech", LONG | {"max_frames": 30})
        assert status in (200, 429, 503)
        return status == 200

    assert wait_for(is_served, 90)


def test_running_stream_completes_during_a_rolling_update(cluster):
    complete = send_request(cluster.url, "/v1/audio/speech", LONG)[2]
    connection = http.client.HTTPConnection(cluster.url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/v1/audio/speech", json.dumps(LONG))
    with connection.getresponse() as response:
        first = response.read(1000)
        deployment = threading.Thread(target=cluster.deploy, kwargs={"seed": 1})
        deployment.start()
        rest = response.read()
        deployment.join(60)
    connection.close()
    assert first + rest == complete
    updated = send_request(cluster.url, "/v1/audio/speech", LONG | {"max_frames": 60})[2]
    assert np.frombuffer(updated[:1000], np.int16).tobytes() != complete[:1000]


def test_autoscaling_adds_and_removes_a_replica(cluster):
    from ray import serve

    def count_running():
        states = serve.status().applications["default"].deployments["Synthesizer"].replica_states
        return states.get("RUNNING", 0)

    cluster.deploy(max_replicas=2, upscale_delay_s=1, downscale_delay_s=5)
    assert count_running() == 1
    stopping, statuses = threading.Event(), []

    def client(number):
        while not stopping.is_set():
            status, _, _ = send_request(cluster.url, "/v1/audio/speech", LONG | {"seed": number, "max_frames": 200})
            statuses.append(status)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(SLOTS + QUEUED)]
    for thread in clients:
        thread.start()
    try:
        assert wait_for(lambda: count_running() == 2, 120)
    finally:
        stopping.set()
        for thread in clients:
            thread.join(60)
    assert set(statuses) == {200}
    assert wait_for(lambda: count_running() == 1, 120)
    assert send_request(cluster.url, "/v1/audio/speech", LONG | {"max_frames": 10})[0] == 200
