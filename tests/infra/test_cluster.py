"""The job on a cluster: submitted from a packaged folder, and with nodes that join and leave."""

import contextlib
import json
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request

import pytest
from ray.job_submission import JobStatus

from tests.infra.clusters import IMPATIENT, Head, Node, processes
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
    # Ray's own deprecation warnings.
    pytest.mark.filterwarnings("ignore"),
    # All of these tests share one cluster.
    pytest.mark.xdist_group("cluster"),
]
SECRET = "hunter2-and-nothing-else"
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def head():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_AUTH_MODE": "disabled", "AWS_SECRET_ACCESS_KEY": SECRET, **IMPATIENT}.items():
            patch.setenv(name, value)
        # It would outrank the address that clients are given.
        patch.delenv("RAY_ADDRESS", raising=False)
        with Head(num_cpus=2) as head:
            yield head


def submit(head, *arguments):
    """Submit a job from this checkout and wait for it; return its state, exit status and log."""
    client = head.client()
    words = [sys.executable, "-W", "ignore", "-m", "jobs.synthesize", *map(str, arguments)]
    job = client.submit_job(entrypoint=" ".join(words), runtime_env={"working_dir": str(ROOT)})
    wait_for(lambda: client.get_job_status(job).is_terminal(), timeout_s=120)
    return client.get_job_status(job), client.get_job_info(job).driver_exit_code, client.get_job_logs(job)


def test_submitted_job_succeeds_and_resumes(head, tmp_path):
    rows = [{"id": f"r{number}", "text": "A few words.", "seed": number} for number in range(3)]
    arguments = ("--manifest", write_manifest(tmp_path / "m.jsonl", rows), "--output", tmp_path / "out")
    state, status, said = submit(head, *arguments, "--max-frames", 20, "--attempts", 1)
    assert (state, status) == (JobStatus.SUCCEEDED, 0), said
    assert f"manifest={tmp_path}/m.jsonl" in said
    assert "(flags)" in said
    assert "3 flagged" in said or "3 ok" in said
    assert sorted(checked_results(tmp_path / "out")) == [0, 1, 2]
    # Rows that are done are not made again, and a bad one gives the job's own exit status.
    write_manifest(tmp_path / "m.jsonl", [*rows, {"id": "bad", "text": ""}])
    state, status, said = submit(head, *arguments, "--max-frames", 20, "--attempts", 1)
    assert (state, status) == (JobStatus.FAILED, 3), said
    assert "3 already done" in said
    assert checked_results(tmp_path / "out")[3]["error_type"] == "invalid_row"


def test_working_dir_package_is_small_and_complete(head):
    """The package of the jobs above, as Ray unpacked it."""
    (package,) = [path for path in head.session.glob("runtime_resources/working_dir_files/_ray_pkg_*") if path.is_dir()]
    names = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    tops = {name.split("/")[0] for name in names}
    assert {"jobs", "serve", "higgs_model", "pyproject.toml"} <= tops
    assert not tops & {".git", ".venv", "tests", "infra", "out"}
    assert {"serve/http/page.html", "jobs/examples/scripts.jsonl"} <= names
    assert sum((package / name).stat().st_size for name in names) < 20 * MEGABYTE


def test_logs_contain_no_secrets(head):
    logs = [path for path in head.session.glob("logs/**/*") if path.is_file()]
    assert len(logs) > 10
    assert [path for path in logs if SECRET.encode() in path.read_bytes()] == []


def uneven(count):
    return [{"id": f"row-{n}", "text": f"Row {n} says a few words. " * (1 + n % 5), "seed": n} for n in range(count)]


def begin(head, folder, rows, *options):
    """Start a job whose rows take a second or two."""
    manifest = write_manifest(folder / "m.jsonl", uneven(rows))
    arguments = ("--manifest", manifest, "--output", folder / "out", "--max-batch", 2, *options)
    return start_job(FAKE_JOB, *arguments, FAKE_PACE="0.3", RAY_ADDRESS=head.address), folder / "out"


def made(job, out, count):
    """Wait until `count` rows are done, or raise with the job's output."""
    with contextlib.suppress(TimeoutError):
        wait_for(lambda: job.poll() is not None or len(list(out.rglob("*.wav"))) >= count)
    if len(list(out.rglob("*.wav"))) < count:
        kill_group(job)
        raise AssertionError(job.communicate())


def ended_well(job, out, rows):
    _, said = job.communicate(timeout=120)
    assert job.returncode == 0, said
    assert sorted(checked_results(out)) == list(range(rows))
    assert not list(out.rglob("*.part"))


def test_job_survives_the_loss_of_a_node(head, tmp_path):
    """Its running rows are done again on the remaining nodes, and every row is in the results once."""
    with Node(head, 2) as node:
        wait_for(lambda: len(head.nodes()) == 2)
        # More workers than the head has room for.
        job, out = begin(head, tmp_path, 80, "--workers", 3)
        wait_for(lambda: processes(node, "MapWorker") or job.poll() is not None)
        made(job, out, 4)
        # Meanwhile the driver tells how far it is.
        wait_for(lambda: "ray_higgs_job_rows_total{" in (said := head.metrics()) and "job_rows_wanted{" in said)
        # Were the ledger there, it would be lost with the machine.
        assert processes(head, "Ledger")
        assert not processes(node, "Ledger")
        node.kill()
        assert len(list(out.rglob("*.wav"))) < 80
        ended_well(job, out, 80)


def test_job_waits_for_gpu_nodes_and_survives_losing_all(head, tmp_path):
    """As with spot instances that an autoscaler scales from zero: the job waits, runs, loses all nodes, continues."""
    job, out = begin(head, tmp_path, 12, "--workers", 1, "--gpus-per-worker", 1)
    with Node(head, 1, "--num-gpus", 1) as node:
        made(job, out, 3)
        node.kill()
        assert len(list(out.rglob("*.wav"))) < 12
    with Node(head, 1, "--num-gpus", 1):
        ended_well(job, out, 12)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no prometheus")
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

    def found(query):
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
            with urllib.request.urlopen(url) as answer:
                return json.load(answer)["data"]["result"]

    try:
        for query in ('up{job="ray"} == 1', "ray_node_cpu_utilization", "ray_node_mem_used / ray_node_mem_total"):
            assert wait_for(lambda: found(query), 30)  # noqa: B023
    finally:
        server.kill()
        server.wait()
