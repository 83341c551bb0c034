"""The AWS cluster configuration, validated by Ray's cluster launcher, and the pod monitor."""

import copy
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "infra/cluster.yaml").read_text())


def prepare(config):
    """Return the configuration with Ray's defaults for AWS, validated by Ray."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_launcher_accepts_the_configuration_and_detects_typos():
    prepared = prepare(CONFIG)
    assert prepared["available_node_types"]["speakers"]["min_workers"] == 0
    for path, value in {("max_worker",): 3, ("docker", "imag"): "x", ("auth", "ssh_usr"): "x"}.items():
        broken = copy.deepcopy(CONFIG)
        parent = broken
        for name in path[:-1]:
            parent = parent[name]
        parent[path[-1]] = value
        with pytest.raises(ValidationError, match=path[-1]):
            prepare(broken)


def test_workers_are_gpu_spot_instances_and_the_head_is_on_demand():
    types = CONFIG["available_node_types"]
    assert types[CONFIG["head_node_type"]]["node_config"].get("InstanceMarketOptions") is None
    assert types["speakers"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert types["speakers"]["resources"]["GPU"] == 1
    assert types["speakers"]["max_workers"] <= CONFIG["max_workers"]


def test_nodes_run_the_image_and_the_dashboard_is_private():
    assert CONFIG["docker"]["image"] == "registry.example.com/higgs-audio-batch:0.1.0-gpu"
    assert "--dashboard-host=127.0.0.1" in CONFIG["head_start_ray_commands"][-1]
    # The volume is mounted where the image caches weights.
    assert any(option.endswith(":/models") for option in CONFIG["docker"]["run_options"])
    assert "HF_HOME=/models" in (ROOT / "infra/Dockerfile").read_text()


def test_deployment_files_contain_no_secrets():
    text = "".join(path.read_text() for path in (ROOT / "infra").rglob("*") if path.is_file())
    for marker in ("AKIA", "BEGIN", "secret_key", "aws_secret", "hf_"):
        assert marker not in text, marker


def test_pod_monitor_scrapes_existing_ports():
    from tests.infra.kustomized import build, find_containers

    (monitor,) = build(ROOT / "infra/kuberay/monitoring")
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    assert set(monitor["spec"]) == {"selector", "podMetricsEndpoints"}
    scraped = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    pod_containers = list(find_containers(build(ROOT / "infra/kuberay/gpu/job")))
    port_names = [{port["name"] for port in container["ports"]} for container in pod_containers]
    assert all("metrics" in names for names in port_names)
    assert scraped <= set().union(*port_names)
    # Alerts about nodes select this job name.
    jobs = [
        relabeling["replacement"]
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
        for relabeling in endpoint["relabelings"]
        if relabeling.get("replacement")
    ]
    assert set(jobs) == {"ray"}
    assert 'up{job="ray"}' in (ROOT / "infra/observability/alerts.yml").read_text()
