"""The AWS cluster configuration, checked by Ray's launcher, and the pod monitor."""

import copy
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "infra/cluster.yaml").read_text())


def read_by_ray(config):
    """The configuration with Ray's AWS defaults, validated by Ray."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole = prepare_config(copy.deepcopy(config))
    validate_config(whole)
    return whole


def test_ray_launcher_accepts_the_configuration():
    whole = read_by_ray(CONFIG)
    assert whole["available_node_types"]["speakers"]["min_workers"] == 0
    for path, value in {("max_worker",): 3, ("docker", "imag"): "x", ("auth", "ssh_usr"): "x"}.items():
        broken = copy.deepcopy(CONFIG)
        place = broken
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        with pytest.raises(ValidationError, match=path[-1]):
            read_by_ray(broken)


def test_workers_are_gpu_spot_instances_and_the_head_is_not():
    types = CONFIG["available_node_types"]
    assert types[CONFIG["head_node_type"]]["node_config"].get("InstanceMarketOptions") is None
    assert types["speakers"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert types["speakers"]["resources"]["GPU"] == 1
    assert types["speakers"]["max_workers"] <= CONFIG["max_workers"]


def test_nodes_run_the_image_and_the_dashboard_is_private():
    assert CONFIG["docker"]["image"] == "registry.example.com/higgs-audio-batch:0.1.0-gpu"
    assert "--dashboard-host=127.0.0.1" in CONFIG["head_start_ray_commands"][-1]
    # Weights are where the image keeps them.
    assert any(option.endswith(":/models") for option in CONFIG["docker"]["run_options"])
    assert "HF_HOME=/models" in (ROOT / "infra/Dockerfile").read_text()


def test_configuration_contains_no_secrets():
    text = "".join(path.read_text() for path in (ROOT / "infra").rglob("*") if path.is_file())
    for mark in ("AKIA", "BEGIN", "secret_key", "aws_secret", "hf_"):
        assert mark not in text, mark


def test_pod_monitor_scrapes_existing_ports():
    from tests.infra.kustomized import build, containers

    (monitor,) = build(ROOT / "infra/kuberay/monitoring")
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    assert set(monitor["spec"]) == {"selector", "podMetricsEndpoints"}
    asked = {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]}
    pods = list(containers(build(ROOT / "infra/kuberay/gpu/job")))
    named = [{port["name"] for port in container["ports"]} for container in pods]
    assert all("metrics" in ports for ports in named)
    assert asked <= set().union(*named)
    # Alerts about nodes ask for the job of this name.
    jobs = [
        one["replacement"]
        for end in monitor["spec"]["podMetricsEndpoints"]
        for one in end["relabelings"]
        if one.get("replacement")
    ]
    assert set(jobs) == {"ray"}
    assert 'up{job="ray"}' in (ROOT / "infra/observability/alerts.yml").read_text()
