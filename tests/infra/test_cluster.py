"""The batch job on a cluster: submitted with a packaged working directory, and with nodes that join and leave."""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request

import pytest
from ray.job_submission import JobStatus

from tests.infra.clusters import FAST_FAILURE_DETECTION, Head, Node, find_processes
from tests.jobs.job_runner import (
    FAKE_JOB,
    ROOT,
    checked_results,
    free_port,
    kill_group,
    start_job,
    wait_for,
    write_manifest,
)

pytestmark = [
    pytest.mark.cluster,
    # Ray emits deprecation warnings of its own.
    pytest.mark.filterwarnings("ignore"),
    # All of these tests share one cluster.
    pytest.mark.xdist_group("cluster"),
]
SECRET = "hunter2-and-nothing-else"
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def head():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        for name, value in FAST_FAILURE_DETECTION.items():
            patch.setenv(name, value)
        # It would take precedence over the address passed to clients.
        patch.delenv("RAY_ADDRESS", raising=False)
        with Head(num_cpus=2) as head:
            yield head


def submit(head, *command):
    """Submit a command from this checkout and wait for it; return its state, exit status and log."""
    client = head.client()
    job = client.submit_job(entrypoint=shlex.join(map(str, command)), runtime_env={"working_dir": str(ROOT)})
    wait_for(lambda: client.get_job_status(job).is_terminal(), timeout_s=120)
    return client.get_job_status(job), client.get_job_info(job).driver_exit_code, client.get_job_logs(job)


def test_submitted_job_succeeds_and_resumes(head, tmp_path):
    rows = [{"id": f"r{number}", "text": "A few words.", "seed": number} for number in range(3)]
    paths = ("--manifest", write_manifest(tmp_path / "m.jsonl", rows), "--output", tmp_path / "out")
    command = (sys.executable, "-W", "ignore", "-m", "jobs.synthesize", *paths, "--max-frames", 20, "--attempts", 1)
    state, status, log = submit(head, *command)
    assert (state, status) == (JobStatus.SUCCEEDED, 0), log
    assert f"manifest={tmp_path}/m.jsonl" in log
    assert "(flags)" in log
    assert "3 flagged" in log or "3 ok" in log
    assert sorted(checked_results(tmp_path / "out")) == [0, 1, 2]
    # Finished rows are skipped, and the exit status reflects the invalid row.
    write_manifest(tmp_path / "m.jsonl", [*rows, {"id": "bad", "text": ""}])
    state, status, log = submit(head, *command)
    assert (state, status) == (JobStatus.FAILED, 3), log
    assert "3 already done" in log
    assert checked_results(tmp_path / "out")[3]["error_type"] == "invalid_row"


def test_working_dir_package_is_small_and_complete(head):
    """A submitted job lists the files of its working directory, which is the package as Ray unpacked it."""
    state, _, log = submit(head, "find", ".", "-type", "f", "-printf", "FILE %s %P\\n")
    assert state == JobStatus.SUCCEEDED, log
    sizes = {name: int(size) for size, name in re.findall(r"^FILE (\d+) (.+)$", log, re.MULTILINE)}
    tops = {name.split("/")[0] for name in sizes}
    assert {"jobs", "serve", "higgs_model", "pyproject.toml"} <= tops
    assert not tops & {".git", ".venv", "tests", "infra", "out"}
    assert {"serve/http/page.html", "jobs/examples/scripts.jsonl"} <= set(sizes)
    assert sum(sizes.values()) < 20 * MEGABYTE


def test_logs_contain_no_secrets(head):
    logs = [path for path in head.session.glob("logs/**/*") if path.is_file()]
    assert len(logs) > 10
    assert [path for path in logs if SECRET.encode() in path.read_bytes()] == []


def rows_of_uneven_length(count):
    return [{"id": f"row-{n}", "text": f"Row {n} says a few words. " * (1 + n % 5), "seed": n} for n in range(count)]


def start_slow_job(head, folder, count, *options):
    """Start a job of `count` rows that take a second or two each; return its process and output folder."""
    manifest = write_manifest(folder / "m.jsonl", rows_of_uneven_length(count))
    arguments = ("--manifest", manifest, "--output", folder / "out", "--max-batch", 2, *options)
    return start_job(FAKE_JOB, *arguments, FAKE_PACE="0.3", RAY_ADDRESS=head.address), folder / "out"


def wait_for_files(job, out, count):
    """Wait until `count` rows are done; raise with the job's output if it ends before."""
    with contextlib.suppress(TimeoutError):
        wait_for(lambda: job.poll() is not None or len(list(out.rglob("*.wav"))) >= count)
    if len(list(out.rglob("*.wav"))) < count:
        kill_group(job)
        raise AssertionError(job.communicate())


def assert_job_succeeds(job, out, count):
    """Wait for the job; assert that it succeeds with every row once in the results and no partial files."""
    _, log = job.communicate(timeout=120)
    assert job.returncode == 0, log
    assert sorted(checked_results(out)) == list(range(count))
    assert not list(out.rglob("*.part"))


def test_job_survives_the_loss_of_a_node(head, tmp_path):
    """Rows that ran on the lost node are retried on the others, and every row is in the results exactly once."""
    with Node(head, 2) as node:
        wait_for(lambda: len(head.nodes()) == 2)
        # More workers than the head has room for.
        job, out = start_slow_job(head, tmp_path, 80, "--workers", 3)
        wait_for(lambda: find_processes(node, "MapWorker") or job.poll() is not None)
        wait_for_files(job, out, 4)
        # Meanwhile the driver exports its progress.
        wait_for(lambda: "ray_higgs_job_rows_total{" in (text := head.metrics()) and "job_rows_wanted{" in text)
        # The ledger must be on the head; on the node it would be lost with it.
        assert find_processes(head, "Ledger")
        assert not find_processes(node, "Ledger")
        node.kill()
        assert len(list(out.rglob("*.wav"))) < 80
        assert_job_succeeds(job, out, 80)


def test_job_waits_for_gpu_nodes_and_survives_losing_all(head, tmp_path):
    """As with spot instances scaled up from zero: the job waits, runs, loses all nodes, and continues on a new one."""
    job, out = start_slow_job(head, tmp_path, 12, "--workers", 1, "--gpus-per-worker", 1)
    with Node(head, 1, "--num-gpus", 1) as node:
        wait_for_files(job, out, 3)
        node.kill()
        assert len(list(out.rglob("*.wav"))) < 12
    with Node(head, 1, "--num-gpus", 1):
        assert_job_succeeds(job, out, 12)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_prometheus_discovers_the_nodes(head, tmp_path):
    config = (ROOT / "infra/observability/prometheus.yml").read_text().replace("/tmp/ray/", f"{head.folder}/")
    shutil.copy(ROOT / "infra/observability/alerts.yml", tmp_path)
    (tmp_path / "prometheus.yml").write_text(config.replace("10s", "1s"))
    port = free_port()
    command = [
        "prometheus",
        "--config.file=prometheus.yml",
        f"--web.listen-address=127.0.0.1:{port}",
        f"--storage.tsdb.path={tmp_path}/data",
    ]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def run_query(query):
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
            with urllib.request.urlopen(url) as response:
                return json.load(response)["data"]["result"]

    try:
        for query in ('up{job="ray"} == 1', "ray_node_cpu_utilization", "ray_node_mem_used / ray_node_mem_total"):
            assert wait_for(lambda: run_query(query), 30)  # noqa: B023
    finally:
        server.kill()
        server.wait()
