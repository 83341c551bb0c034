"""Monitoring: queries use exported metrics, and Prometheus and Grafana accept the configuration."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "infra/observability"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
# Added by Prometheus, or by Ray to every metric.
COMMON_LABELS = {"job", "instance", "le"}


def exported_metrics(*factories):
    """Return the labels of the metrics that these factories create, by exported name."""
    labels = {}
    with pytest.MonkeyPatch.context() as patch:
        import ray.util.metrics

        original = ray.util.metrics.Metric.__init__

        def record(metric, name, description="", tag_keys=None):
            original(metric, name, description, tag_keys)
            kind = type(metric).__name__
            suffixes = {"Counter": ["_total"], "Histogram": ["_bucket", "_sum", "_count"]}.get(kind, [""])
            labels.update({f"ray_{name}{suffix}": set(tag_keys or ()) for suffix in suffixes})

        patch.setattr(ray.util.metrics.Metric, "__init__", record)
        for create in factories:
            create()
    return labels


@pytest.fixture(scope="module")
def exported():
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    from jobs.synthesize.metrics import JobMetrics
    from serve.http.request_log import EngineMetrics, RequestMetrics

    own = exported_metrics(lambda: JobMetrics("run"), RequestMetrics, EngineMetrics)
    assert len(own) > 20
    # Ray exports metrics of nodes itself, and labels those of GPUs with their index.
    return own | {"up": set()} | {f"ray_{name}": {"GpuIndex"} for name in METRICS_GAUGES}


def parse_selectors(query):
    """Return the metrics that a query selects, each with the labels it filters by."""
    found = []

    def visit(node):
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, {matcher.name for matcher in node.matchers.matchers}))
        return True

    promql_parser.walk(promql_parser.parse(query), visit)
    return found


def all_queries():
    """Yield the title and query of every panel and alert."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for rule in RULES:
        yield rule["alert"], rule["expr"]


@pytest.mark.parametrize(("title", "query"), list(all_queries()), ids=lambda value: re.sub(r"\W+", "-", value)[:40])
def test_every_queried_metric_is_exported(exported, title, query):
    found = parse_selectors(query)
    assert found
    for name, labels in found:
        assert name in exported, f"{title}: {name} is not exported"
        assert labels <= exported[name] | COMMON_LABELS, f"{title}: {name} has no label {labels - exported[name]}"
    # The labels that the query groups by must exist, too.
    known = set().union(*(exported[name] for name, _ in found)) | COMMON_LABELS
    assert {label for group in re.findall(r"by \((.*?)\)", query) for label in group.split(", ")} <= known


def test_unknown_metric_is_detected(exported):
    ((name, labels),) = parse_selectors('sum(rate(ray_higgs_job_rows{status="ok"}[5m]))')
    assert (name, labels) == ("ray_higgs_job_rows", {"status"})
    assert name not in exported


def test_legends_use_existing_labels(exported):
    for panel in PANELS:
        for target in panel["targets"]:
            labels = set().union(*(exported[name] for name, _ in parse_selectors(target["expr"]))) | COMMON_LABELS
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, panel["title"]


def test_engine_snapshot_has_all_exported_metrics():
    from higgs_model import Synthesizer
    from jobs.synthesize.metrics import ENGINE_METRICS
    from serve.http.request_log import EngineMetrics

    synthesizer = Synthesizer.from_pretrained("demo")
    names = set(synthesizer.metrics())
    synthesizer.close()
    assert set(ENGINE_METRICS) <= names
    assert set(EngineMetrics._NAMES) <= names


def test_job_counters_export_increments(monkeypatch):
    from jobs.synthesize import metrics
    from jobs.synthesize.ledger import Totals

    exported = []

    class FakeMetric:
        def __init__(self, name, description, tag_keys):
            self.name = name

        def inc(self, value, tags):
            exported.append((self.name, value, tags.get("status")))

        set = inc

    monkeypatch.setattr(metrics, "Counter", FakeMetric)
    monkeypatch.setattr(metrics, "Gauge", FakeMetric)
    job_metrics = metrics.JobMetrics("run")
    for totals in (
        Totals(rows=9, ok=2, audio_s=3.0),
        Totals(rows=9, ok=2, audio_s=3.0),
        Totals(rows=9, ok=5, failed=1),
    ):
        job_metrics.update(totals, {"0123456789": {"occupancy": 0.5, "unknown": 1}})
    assert [sample for sample in exported if "rows" in sample[0] and sample[2]] == [
        ("higgs_job_rows", 2, "ok"),
        ("higgs_job_rows", 3, "ok"),
        ("higgs_job_rows", 1, "failed"),
    ]
    assert [value for name, value, _ in exported if "audio" in name] == [3.0]
    assert ("higgs_job_engine_occupancy", 0.5, None) in exported


def round_trip_through_grafana(dashboard):
    """Return a dashboard as Grafana's own model writes it after reading it."""
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    return json.loads(json.dumps(Dashboard.from_json(json.loads(json.dumps(dashboard))), cls=JSONEncoder))


def find_lost(ours, theirs, path="dashboard"):
    """Yield the paths of values in `ours` that are missing or different in `theirs`."""
    if isinstance(ours, dict):
        for name, value in ours.items():
            if isinstance(theirs, dict) and name in theirs:
                yield from find_lost(value, theirs[name], f"{path}.{name}")
            else:
                yield f"{path}.{name}"
    elif isinstance(ours, list):
        for index, (our_item, their_item) in enumerate(zip(ours, theirs, strict=True)):
            yield from find_lost(our_item, their_item, f"{path}[{index}]")
    elif ours != theirs:
        yield path


def test_grafana_model_round_trips_the_dashboard():
    assert list(find_lost(DASHBOARD, round_trip_through_grafana(DASHBOARD))) == []
    broken = json.loads(json.dumps(DASHBOARD))
    broken["panels"][1]["targts"] = broken["panels"][1].pop("targets")
    assert list(find_lost(broken, round_trip_through_grafana(broken))) == ["dashboard.panels[1].targts"]


def test_panels_do_not_overlap():
    occupied = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        columns = range(grid["x"], grid["x"] + grid["w"])
        cells = {(x, y) for x in columns for y in range(grid["y"], grid["y"] + grid["h"])}
        assert not cells & occupied, panel["title"]
        assert max(x for x, _ in cells) < 24
        occupied |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["description"] for panel in PANELS)


def test_every_alert_has_a_summary_and_a_next_step():
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "look"}
        promql_parser.parse_duration(rule["for"])


ALERT_TESTS = """
rule_files: [alerts.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    name: a job without any progress raises an alert, running and finished jobs do not
    input_series:
      - {series: 'ray_higgs_job_rows_wanted{run="never"}', values: "9x120"}
      - {series: 'ray_higgs_job_rows_wanted{run="going"}', values: "900x120"}
      - {series: 'ray_higgs_job_rows_total{run="going", status="ok"}', values: "0+1x120"}
      - {series: 'ray_higgs_job_audio_seconds_total{run="going"}', values: "0+60x120"}
      - {series: 'ray_higgs_job_rows_wanted{run="done"}', values: "5x120"}
      - {series: 'ray_higgs_job_rows_total{run="done", status="ok"}', values: "5x120"}
    alert_rule_test:
      - eval_time: 90m
        alertname: JobStands
        exp_alerts:
          - exp_labels: {severity: page, run: never}
            exp_annotations:
              summary: Run never has rows left but has generated no audio for half an hour.
              look: "`ray status` for workers that wait for nodes; the driver's log in the Ray dashboard."
  - interval: 1m
    name: one row in ten fails
    input_series:
      - {series: 'ray_higgs_job_rows_total{run="r", status="ok"}', values: "0+9x60"}
      - {series: 'ray_higgs_job_rows_total{run="r", status="failed"}', values: "0+1x60"}
      - {series: 'ray_higgs_job_rows_total{run="r", status="skipped"}', values: "0+1000x60"}
    alert_rule_test:
      - eval_time: 50m
        alertname: JobRowsFail
        exp_alerts:
          - exp_labels: {severity: ticket, run: r}
            exp_annotations:
              summary: 10% of the latest rows of run r failed.
              look: The columns error_type and error of the results.
"""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_configuration_and_alerts_fire(tmp_path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "alert_tests.yml").write_text(ALERT_TESTS)
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "alert_tests.yml"]):
        done = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_configuration_uses_rays_service_discovery():
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (discovery,) = job["file_sd_configs"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert [Path(path).name for path in discovery["files"]] == [PROMETHEUS_SERVICE_DISCOVERY_FILE]
    assert config["rule_files"] == ["alerts.yml"]
    # Alerts about nodes select this job name.
    assert any('job="ray"' in rule["expr"] for rule in RULES)
    assert job["job_name"] == "ray"
