"""The KubeRay manifests: all fields exist, and all settings are valid."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jobs.synthesize.settings import parse_settings
from serve.deployments.settings import resolve_config
from tests.infra.kustomized import build, find_containers
from tests.infra.ray_io import find_crd_errors, find_errors

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "infra/kuberay"
OVERLAYS = [KUBERAY / device / kind for device in ("cpu", "gpu") for kind in ("cluster", "job", "service")]
RAY = "2.60.0"


def cluster_spec(resource):
    """Return the cluster specification in a resource."""
    spec = resource["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def resources_by_kind(overlay):
    """Build an overlay such as `gpu/job`; return its resources by kind."""
    return {resource["kind"]: resource for resource in build(KUBERAY / overlay)}


@pytest.fixture(params=OVERLAYS, ids=lambda path: "-".join(path.parts[-2:]))
def overlay(request):
    return request.param


@pytest.fixture
def ray_resource(overlay):
    (resource,) = [resource for resource in build(overlay) if resource["apiVersion"].startswith("ray.io")]
    return resource


def test_every_field_exists_in_kuberay(ray_resource):
    assert find_errors(ray_resource) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("entrypont", "python"),
        ("backoffLimit", "2"),
        ("shutdownAfterJobFinishes", "yes"),
        ("rayClusterSpec.workerGroupSpecs.0.minReplica", 1),
        ("rayClusterSpec.workerGroupSpecs.0.maxReplicas", None),
        ("rayClusterSpec.autoscalerOptions.version", "v3"),
        ("rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 2),
        ("rayClusterSpec.headGroupSpec.template.spec.containers.0.imag", "x"),
        ("rayClusterSpec.headGroupSpec.template.spec.containers.0.ports.0.containerPort", "6379"),
    ],
)
def test_typos_and_wrong_types_are_detected(path, value):
    job = resources_by_kind("gpu/job")["RayJob"]
    *parents, last = path.split(".")
    parent = job["spec"]
    for name in parents:
        parent = parent[int(name)] if name.isdigit() else parent[name]
    if value is None:
        del parent[last]
    else:
        parent[last] = value
    assert last in "".join(find_errors(job))


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS is not set")
def test_kuberay_crds_accept_the_manifests(ray_resource):
    """`KUBERAY_CRDS` is the folder `ray-operator/config/crd/bases` of a KubeRay checkout."""
    text = (Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{ray_resource['kind'].lower()}s.yaml").read_text()
    assert find_crd_errors(ray_resource, text) == []
    ray_resource["spec"]["entrypont"] = "python"
    assert len(find_crd_errors(ray_resource, text)) == 1


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_builds_the_same_resources(overlay):
    done = subprocess.run(["kubectl", "kustomize", str(overlay)], check=True, capture_output=True, text=True)

    def by_name(resources):
        return {(resource["kind"], resource["metadata"]["name"]): resource for resource in resources}

    assert by_name(yaml.safe_load_all(done.stdout)) == by_name(build(overlay))


def test_all_pods_run_one_image_with_the_pinned_ray(overlay, ray_resource):
    images = {container["image"] for container in find_containers(ray_resource)}
    assert images == {f"registry.example.com/higgs-audio-batch:0.1.0-{overlay.parts[-2]}"}
    assert cluster_spec(ray_resource)["rayVersion"] == RAY
    assert f"ray=={RAY}" in (ROOT / "constraints.txt").read_text().split()
    assert f"RAY_VERSION={RAY}" in (ROOT / "infra/Dockerfile").read_text()


def test_only_workers_request_gpus(overlay, ray_resource):
    cluster = cluster_spec(ray_resource)
    expected = "1" if overlay.parts[-2] == "gpu" else None
    for group in cluster["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        for kind in ("requests", "limits"):
            assert container["resources"][kind].get("nvidia.com/gpu") == expected
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in str(head["resources"])


def test_credentials_come_from_a_secret(ray_resource):
    for container in find_containers(ray_resource):
        assert container["envFrom"] == [{"secretRef": {"name": "higgs", "optional": True}}]
        assert "env" not in container
    assert cluster_spec(ray_resource)["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_job_settings_are_valid(device, tmp_path):
    resources = resources_by_kind(f"{device}/job")
    ((name, text),) = resources["ConfigMap"]["data"].items()
    (tmp_path / name).write_text(text)
    job = resources["RayJob"]["spec"]
    command, _, file = job["entrypoint"].rpartition(" ")
    assert command == "python -m jobs.synthesize --config"
    settings = parse_settings(["--config", str(tmp_path / Path(file).name)])
    assert settings.output.startswith("s3://")
    # The entrypoint reads its settings from the mounted ConfigMap.
    (head,) = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    (mount,) = [mount for mount in head["volumeMounts"] if mount["mountPath"] == str(Path(file).parent)]
    pod = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mount["name"]]["configMap"]["name"] == resources["ConfigMap"]["metadata"]["name"]
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    if device == "gpu":
        # Scaled up from zero: the job requests as many workers as the group may grow to.
        assert (group["minReplicas"], settings.gpus_per_worker) == (0, 1)
        assert settings.workers == group["maxReplicas"]
    else:
        assert group["minReplicas"] > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_service_settings_are_valid(device):
    from ray.serve.schema import ServeDeploySchema

    service = resources_by_kind(f"{device}/service")["RayService"]["spec"]
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"])).applications
    config = resolve_config(application.args)
    assert application.import_path == "serve.app:app"
    # Neither the old cluster nor a pod stops before the longest request has finished.
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert service["rayClusterDeletionDelaySeconds"] > config.request_timeout_s
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > config.request_timeout_s
    assert config.max_replicas <= group["maxReplicas"]
