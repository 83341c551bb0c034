"""Monitoring: queries refer to exported metrics, and the tools accept the configuration."""

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
# Prometheus adds these itself, or Ray to every metric.
EVERYWHERE = {"job", "instance", "le"}


def metrics_of(*makers):
    """Return the exported names and labels of the metrics that these objects create."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        import ray.util.metrics

        original = ray.util.metrics.Metric.__init__

        def remember(metric, name, description="", tag_keys=None):
            original(metric, name, description, tag_keys)
            kind = type(metric).__name__
            ends = {"Counter": ["_total"], "Histogram": ["_bucket", "_sum", "_count"]}.get(kind, [""])
            made.update({f"ray_{name}{end}": set(tag_keys or ()) for end in ends})

        patch.setattr(ray.util.metrics.Metric, "__init__", remember)
        for make in makers:
            make()
    return made


@pytest.fixture(scope="module")
def exported():
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    from jobs.synthesize.metrics import JobMetrics
    from serve.http.request_log import EngineMetrics, RequestMetrics

    ours = metrics_of(lambda: JobMetrics("run"), RequestMetrics, EngineMetrics)
    assert len(ours) > 20
    # Of nodes Ray tells by itself; it adds what a GPU is to those of GPUs.
    return ours | {"up": set()} | {f"ray_{name}": {"GpuIndex"} for name in METRICS_GAUGES}


def selectors(query):
    """Return every metric of a query with the labels used."""
    found = []

    def see(node):
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, {one.name for one in node.matchers.matchers}))
        return True

    promql_parser.walk(promql_parser.parse(query), see)
    return found


def queries():
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for rule in RULES:
        yield rule["alert"], rule["expr"]


@pytest.mark.parametrize(("where", "query"), list(queries()), ids=lambda value: re.sub(r"\W+", "-", value)[:40])
def test_every_queried_metric_is_exported(exported, where, query):
    found = selectors(query)
    assert found
    for name, labels in found:
        assert name in exported, f"{where}: nothing exports {name}"
        assert labels <= exported[name] | EVERYWHERE, f"{where}: {name} has no label {labels - exported[name]}"
    # What a query groups by or a legend names is a label, too.
    known = set().union(*(exported[name] for name, _ in found)) | EVERYWHERE
    assert {label for inside in re.findall(r"by \((.*?)\)", query) for label in inside.split(", ")} <= known


def test_unknown_metric_is_detected(exported):
    ((name, labels),) = selectors('sum(rate(ray_higgs_job_rows{status="ok"}[5m]))')
    assert (name, labels) == ("ray_higgs_job_rows", {"status"})
    assert name not in exported


def test_legends_use_existing_labels(exported):
    for panel in PANELS:
        for target in panel["targets"]:
            labels = set().union(*(exported[name] for name, _ in selectors(target["expr"]))) | EVERYWHERE
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, panel["title"]


def test_engine_snapshot_has_all_exported_metrics():
    from higgs_model import Synthesizer
    from jobs.synthesize.metrics import ENGINE_METRICS
    from serve.http.request_log import EngineMetrics

    speaks = Synthesizer.from_pretrained("demo")
    said = set(speaks.metrics())
    speaks.close()
    assert set(ENGINE_METRICS) <= said
    assert set(EngineMetrics._NAMES) <= said


def test_job_counters_export_increments(monkeypatch):
    from jobs.synthesize import metrics
    from jobs.synthesize.ledger import Totals

    exported = []

    class Fake:
        def __init__(self, name, description, tag_keys):
            self.name = name

        def inc(self, value, tags):
            exported.append((self.name, value, tags.get("status")))

        set = inc

    monkeypatch.setattr(metrics, "Counter", Fake)
    monkeypatch.setattr(metrics, "Gauge", Fake)
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


def read_by_grafana(dashboard):
    """Round-trip a dashboard through Grafana's own model."""
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    return json.loads(json.dumps(Dashboard.from_json(json.loads(json.dumps(dashboard))), cls=JSONEncoder))


def lost(ours, theirs, place="dashboard"):
    """Return what is in one value and missing in the other."""
    if isinstance(ours, dict):
        for name, value in ours.items():
            inside = theirs.get(name, theirs) if isinstance(theirs, dict) else theirs
            yield from lost(value, inside, f"{place}.{name}") if inside is not theirs else [f"{place}.{name}"]
    elif isinstance(ours, list):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from lost(one, other, f"{place}[{number}]")
    elif ours != theirs:
        yield place


def test_grafana_model_round_trips_the_dashboard():
    assert list(lost(DASHBOARD, read_by_grafana(DASHBOARD))) == []
    broken = json.loads(json.dumps(DASHBOARD))
    broken["panels"][1]["targts"] = broken["panels"][1].pop("targets")
    assert list(lost(broken, read_by_grafana(broken))) == ["dashboard.panels[1].targts"]


def test_panels_do_not_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["description"] for panel in PANELS)


def test_every_alert_has_a_summary_and_a_runbook():
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "look"}
        promql_parser.parse_duration(rule["for"])


TOLD = """
rule_files: [alerts.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    name: a job that never made anything is seen, one that goes on or is done is not
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
              summary: Run never has made no audio for half an hour, and rows are left.
              look: "`ray status` for workers that wait for machines; the dashboard's logs of the driver."
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
              summary: 10% of the rows of run r fail.
              look: The columns error_type and error of the results.
"""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool")
def test_promtool_accepts_the_configuration_and_alerts_fire(tmp_path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "told.yml").write_text(TOLD)
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "told.yml"]):
        done = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_configuration_uses_rays_service_discovery():
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (places,) = job["file_sd_configs"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert [Path(path).name for path in places["files"]] == [PROMETHEUS_SERVICE_DISCOVERY_FILE]
    assert config["rule_files"] == ["alerts.yml"]
    # Alerts about nodes ask for this job by its name.
    assert any('job="ray"' in rule["expr"] for rule in RULES)
    assert job["job_name"] == "ray"
