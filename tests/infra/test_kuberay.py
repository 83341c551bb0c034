"""The KubeRay manifests: all fields exist, and all settings are valid."""

import copy
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jobs.synthesize.settings import parse_settings
from serve.deployments.settings import resolve_config
from tests.infra.kustomized import build, containers
from tests.infra.ray_io import check_crd, faults

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "infra/kuberay"
OVERLAYS = [KUBERAY / place / kind for place in ("cpu", "gpu") for kind in ("cluster", "job", "service")]
RAY = "2.60.0"


def clusters(resource):
    """Return the cluster specification of a resource."""
    spec = resource["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


@pytest.fixture(params=OVERLAYS, ids=lambda path: "-".join(path.parts[-2:]))
def overlay(request):
    return request.param


@pytest.fixture
def rays(overlay):
    return [one for one in build(overlay) if one["apiVersion"].startswith("ray.io")]


def test_every_field_exists_in_kuberay(rays):
    assert len(rays) == 1
    assert faults(rays[0]) == []


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
def test_typo_is_detected(path, value):
    job = next(copy.deepcopy(one) for one in build(KUBERAY / "gpu/job") if one["kind"] == "RayJob")
    *above, last = path.split(".")
    place = job["spec"]
    for name in above:
        place = place[int(name)] if name.isdigit() else place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    assert last in "".join(faults(job))


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder with KubeRay's definitions")
def test_kuberay_crds_accept_the_manifests(rays):
    """`KUBERAY_CRDS`: `ray-operator/config/crd/bases` of a KubeRay checkout."""
    text = (Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{rays[0]['kind'].lower()}s.yaml").read_text()
    assert check_crd(rays[0], text) == []
    rays[0]["spec"]["entrypont"] = "python"
    assert len(check_crd(rays[0], text)) == 1


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")
def test_kubectl_builds_the_same(overlay):
    done = subprocess.run(["kubectl", "kustomize", str(overlay)], check=True, capture_output=True, text=True)

    def by_name(resources):
        return {(one["kind"], one["metadata"]["name"]): one for one in resources}

    assert by_name(yaml.safe_load_all(done.stdout)) == by_name(build(overlay))


def test_all_pods_run_one_image_with_the_pinned_ray(overlay, rays):
    images = {container["image"] for container in containers(rays)}
    assert images == {f"registry.example.com/higgs-audio-batch:0.1.0-{overlay.parts[-2]}"}
    assert clusters(rays[0])["rayVersion"] == RAY
    assert f"ray=={RAY}" in (ROOT / "constraints.txt").read_text().split()
    assert f"RAY_VERSION={RAY}" in (ROOT / "infra/Dockerfile").read_text()


def test_only_workers_request_gpus(overlay, rays):
    cluster = clusters(rays[0])
    wanted = "1" if overlay.parts[-2] == "gpu" else None
    for group in cluster["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        for kind in ("requests", "limits"):
            assert container["resources"][kind].get("nvidia.com/gpu") == wanted
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in str(head["resources"])


def test_secrets_are_references(rays):
    for container in containers(rays):
        assert container["envFrom"] == [{"secretRef": {"name": "higgs", "optional": True}}]
        assert "env" not in container
    assert clusters(rays[0])["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("place", ["cpu", "gpu"])
def test_job_settings_are_valid(place, tmp_path):
    resources = {one["kind"]: one for one in build(KUBERAY / place / "job")}
    (name, text), *more = resources["ConfigMap"]["data"].items()
    assert not more
    (tmp_path / name).write_text(text)
    job = resources["RayJob"]["spec"]
    command, _, file = job["entrypoint"].rpartition(" ")
    assert command == "python -m jobs.synthesize --config"
    settings = parse_settings(["--config", str(tmp_path / Path(file).name)])
    assert settings.output.startswith("s3://")
    # The folder in which the entrypoint looks is the mounted one.
    (head,) = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    (mount,) = [one for one in head["volumeMounts"] if one["mountPath"] == str(Path(file).parent)]
    volumes = {one["name"]: one for one in job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]}
    assert volumes[mount["name"]]["configMap"]["name"] == resources["ConfigMap"]["metadata"]["name"]
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    if place == "gpu":
        # From nothing: what the job asks for is what the group may grow to.
        assert (group["minReplicas"], settings.gpus_per_worker) == (0, 1)
        assert settings.workers == group["maxReplicas"]
    else:
        assert group["minReplicas"] > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("place", ["cpu", "gpu"])
def test_service_settings_are_valid(place):
    from ray.serve.schema import ServeDeploySchema

    (service,) = [one["spec"] for one in build(KUBERAY / place / "service") if one["kind"] == "RayService"]
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"])).applications
    config = resolve_config(application.args)
    assert application.import_path == "serve.app:app"
    # Neither the old cluster nor a machine goes before the longest request is over.
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert service["rayClusterDeletionDelaySeconds"] > config.request_timeout_s
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > config.request_timeout_s
    assert config.max_replicas <= group["maxReplicas"]
