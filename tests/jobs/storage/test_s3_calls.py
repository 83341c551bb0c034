"""The number of S3 requests of a job, which limits how many GPUs one bucket supports."""

import collections
import re
import threading

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from jobs.benchmark import capacity
from tests.jobs.job_runner import FAKE_JOB, run_job, write_manifest
from tests.s3 import Bucket

pytestmark = pytest.mark.xdist_group("ray")
CHARS_PER_S = 15


@pytest.fixture
def counting_bucket():
    """A bucket, and a counter of its requests by method and kind of file."""
    calls = collections.Counter()
    app = DomainDispatcherApplication(create_backend_app)

    def count(environ, start_response):
        kind = re.match(r"/books/out/(audio|results|[\w.]+)", environ["PATH_INFO"])
        calls[environ["REQUEST_METHOD"], kind[1] if kind else ""] += 1
        return app(environ, start_response)

    server = make_server("127.0.0.1", 0, count, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    bucket = Bucket.__new__(Bucket)
    bucket.name, bucket.uri, bucket.address = "books", "s3://books", ("127.0.0.1", server.server_port)
    bucket.client().create_bucket(Bucket="books")
    yield bucket, calls
    bucket.remove()
    server.shutdown()


def test_number_of_s3_writes_per_row(tmp_path, counting_bucket):
    bucket, calls = counting_bucket
    short = [{"id": f"row-{number}", "text": f"Row {number} says a few words."} for number in range(12)]
    long_s = 400
    words = "long " * (long_s * CHARS_PER_S // 5)
    manifest = write_manifest(tmp_path / "m.jsonl", [*short, {"id": "long", "text": words, "chunk_method": "none"}])
    environment = bucket.environment() | {"RAY_ADDRESS": ""}
    status, _, stderr = run_job(FAKE_JOB, "--manifest", manifest, "--output", f"{bucket.uri}/out", **environment)
    assert status == 0, stderr
    n = capacity.parse_numbers(capacity.PAGE.read_text())
    writes = calls["PUT", "audio"] + calls["POST", "audio"]
    assert writes == len(short) * capacity.s3_writes(2, n) + capacity.s3_writes(long_s, n)
    assert capacity.s3_writes(long_s, n) > 3
    # Other writes do not grow with the number of rows: result parts, their owner, and the summary.
    assert calls["PUT", "job.json"] == 1
    assert calls["PUT", "results"] < len(short)
    assert sum(number for (method, kind), number in calls.items() if method == "GET" and kind == "audio") == 0
