"""The batch job with everything on S3, on a server that is slow and fails one call in twenty."""

import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from tests.jobs.job_runner import FAKE_JOB, checked_results, run_job
from tests.s3 import UnreliableProxy

pytestmark = pytest.mark.xdist_group("ray")

COLUMNS = ("id", "text", "voice", "ref_audio", "ref_text")
LONG = "A long row is uploaded in several parts. " * 80


def test_job_succeeds_with_an_unreliable_s3_server(bucket, monkeypatch):
    file = io.BytesIO()
    soundfile.write(file, 0.2 * np.sin(np.arange(24_000 * 4) * 0.05), 24_000, format="FLAC")
    bucket.put("voices/ann.flac", file.getvalue())
    bucket.put("voices/ann.txt", b"Some words that were said.")
    bucket.put("scripts/one-off.flac", file.getvalue())
    rows = [{"id": f"row-{n}", "text": f"Row {n} says a few words.", "voice": "ann"} for n in range(20)]
    rows[3] |= {"voice": None, "ref_audio": "one-off.flac", "ref_text": "Some words that were said."}
    rows[5]["text"] = LONG
    for part in range(2):
        file = io.BytesIO()
        pq.write_table(
            pa.Table.from_pylist([*rows[part::2]], schema=pa.schema(dict.fromkeys(COLUMNS, pa.string()))), file
        )
        bucket.put(f"scripts/part-{part}.parquet", file.getvalue())
    proxy = UnreliableProxy(bucket.address, failure_rate=0.05, max_delay_s=0.05)
    environment = bucket.environment(proxy.endpoint) | {"RAY_ADDRESS": ""}
    arguments = (
        "--manifest",
        f"{bucket.uri}/scripts",
        "--voices",
        f"{bucket.uri}/voices",
        "--output",
        f"{bucket.uri}/out",
    )
    status, _, stderr = run_job(FAKE_JOB, *arguments, "--keep-codes", **environment)
    assert status == 0, stderr
    assert proxy.failures
    status, _, stderr = run_job(FAKE_JOB, *arguments, **environment)
    proxy.stop()
    assert status == 0, stderr
    assert "20 already done" in stderr

    bucket.set_environment(monkeypatch)
    results = checked_results(f"{bucket.uri}/out")
    assert {row["id"]: row["status"] for row in results.values()} == {row["id"]: "ok" for row in rows}
    for row in results.values():
        content = bucket.get(row["audio_path"].removeprefix(f"{bucket.uri}/"))
        assert hashlib.sha256(content).hexdigest() == row["audio_sha256"]
    subfolders = {key.split("/")[1] for key in bucket.names() if key.startswith("out/")}
    assert subfolders == {"audio", "codes", "results", "job.json"}
