"""The parts of `ray.io/v1` (KubeRay 1.7) that our manifests use: field by field, so that a typo or a wrong type fails.

A field's kind is a Python type, a tuple of allowed values, a list of one kind, a dictionary of fields (`!` after a
name: it must be there), or `POD`, which Kubernetes' own schema judges. `check_crd` asks KubeRay's published definitions
instead.
"""

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator

POD = object()
TEXTS = object()
"""A map of strings."""
CLUSTER = {
    "rayVersion": str,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"version": ("v1", "v2"), "idleTimeoutSeconds": int},
    "authOptions": {"mode": ("token", "disabled")},
    "headGroupSpec!": {"rayStartParams": TEXTS, "template!": POD},
    "workerGroupSpecs": [
        {
            "groupName!": str,
            "replicas": int,
            "minReplicas!": int,
            "maxReplicas!": int,
            "rayStartParams": TEXTS,
            "template!": POD,
        }
    ],
}
SPECS = {
    "RayCluster": CLUSTER,
    "RayJob": {
        "entrypoint": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": CLUSTER,
    },
    "RayService": {
        "upgradeStrategy": {"type": ("None", "NewCluster", "NewClusterWithIncrementalUpgrade")},
        "rayClusterDeletionDelaySeconds": int,
        "excludeHeadPodFromServeSvc": bool,
        "serveConfigV2": str,
        "rayClusterConfig!": CLUSTER,
    },
}


def faults(resource):
    """Return the errors in a resource with their paths."""
    whole = {"apiVersion!": ("ray.io/v1",), "kind!": tuple(SPECS), "metadata!": {"name!": str}}
    return list(_faults(resource, whole | {"spec!": SPECS.get(resource.get("kind"), {})}, resource.get("kind", "?")))


def _faults(value, kind, place):
    if kind is POD:
        yield from pod_faults(value, place)
    elif isinstance(kind, dict):
        yield from _map_faults(value, kind, place)
    elif isinstance(kind, list):
        for number, one in enumerate(value if isinstance(value, list) else ["no list"]):
            yield from _faults(one, kind[0], f"{place}[{number}]")
    elif kind is TEXTS:
        pairs = value.items() if isinstance(value, dict) else [("", value)]
        yield from (f"{place}.{name} is {one!r}, not text" for name, one in pairs if not isinstance(one, str))
    elif isinstance(kind, tuple):
        if value not in kind:
            yield f"{place} is {value!r}, not one of {kind}"
    elif type(value) is not kind:
        yield f"{place} is {value!r}, not {kind.__name__}"


def _map_faults(value, kind, place):
    if not isinstance(value, dict):
        yield f"{place} is no map"
        return
    fields = {name.rstrip("!"): inner for name, inner in kind.items()}
    yield from (f"{place}.{name} is no field" for name in value if name not in fields)
    yield from (f"{place}.{name[:-1]} is missing" for name in kind if name.endswith("!") and name[:-1] not in value)
    for name in value.keys() & fields.keys():
        yield from _faults(value[name], fields[name], f"{place}.{name}")


def pod_faults(template, place):
    """Validate a pod against Kubernetes' schema."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
    try:
        kubernetes_validate.validate(pod, "1.33", strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{place}: {error}"


def check_crd(resource, text):
    """Validate a resource against a CustomResourceDefinition, with unknown fields as errors."""
    definition = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(one for one in definition["spec"]["versions"] if one["name"] == "v1")
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(resource)]


def _strict(schema):
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        made.setdefault("additionalProperties", False)
    return made
