"""How often a job writes to S3, which limits how many GPUs one bucket supports."""

import collections
import re
import threading

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from jobs.benchmark import capacity
from tests.jobs.running import FAKE, run, write_manifest
from tests.s3 import Bucket

pytestmark = pytest.mark.xdist_group("ray")
CHARS_A_SECOND = 15


@pytest.fixture
def counted():
    """A server that counts requests by method and kind of file."""
    calls = collections.Counter()
    app = DomainDispatcherApplication(create_backend_app)

    def count(environment, start_response):
        kind = re.match(r"/books/out/(audio|results|[\w.]+)", environment["PATH_INFO"])
        calls[environment["REQUEST_METHOD"], kind[1] if kind else ""] += 1
        return app(environment, start_response)

    server = make_server("127.0.0.1", 0, count, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    bucket = Bucket.__new__(Bucket)
    bucket.name, bucket.uri, bucket.address = "books", "s3://books", ("127.0.0.1", server.server_port)
    bucket.client().create_bucket(Bucket="books")
    yield bucket, calls
    bucket.remove()
    server.shutdown()


def test_number_of_s3_writes_per_row(tmp_path, counted):
    bucket, calls = counted
    short = [{"id": f"row-{number}", "text": f"Row {number} says a few words."} for number in range(12)]
    long_s = 400
    words = "long " * (long_s * CHARS_A_SECOND // 5)
    manifest = write_manifest(tmp_path / "m.jsonl", [*short, {"id": "long", "text": words, "chunk_method": "none"}])
    place = bucket.environment() | {"RAY_ADDRESS": ""}
    status, _, said = run(FAKE, "--manifest", manifest, "--output", f"{bucket.uri}/out", **place)
    assert status == 0, said
    n = capacity.numbers(capacity.PAGE.read_text())
    writes = calls["PUT", "audio"] + calls["POST", "audio"]
    assert writes == len(short) * capacity.s3_writes(2, n) + capacity.s3_writes(long_s, n)
    assert capacity.s3_writes(long_s, n) > 3
    # The rest does not grow with the rows: parts of results, who writes there, and the summary.
    assert calls["PUT", "job.json"] == 1
    assert calls["PUT", "results"] < len(short)
    assert sum(number for (method, kind), number in calls.items() if method == "GET" and kind == "audio") == 0
