"""Schema of the fields of `ray.io/v1` (KubeRay 1.7) that the manifests use; detects typos and wrong types.

A schema is a Python type, a tuple of allowed values, a list with the schema of its items, a dictionary of fields (`!`
marks a required field), `STRING_MAP`, or `POD`, which is validated against Kubernetes' schema. `find_crd_errors`
validates against KubeRay's published definitions instead.
"""

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator

POD = object()
STRING_MAP = object()
CLUSTER = {
    "rayVersion": str,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"version": ("v1", "v2"), "idleTimeoutSeconds": int},
    "authOptions": {"mode": ("token", "disabled")},
    "headGroupSpec!": {"rayStartParams": STRING_MAP, "template!": POD},
    "workerGroupSpecs": [
        {
            "groupName!": str,
            "replicas": int,
            "minReplicas!": int,
            "maxReplicas!": int,
            "rayStartParams": STRING_MAP,
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


def find_errors(resource):
    """Return the errors in a resource with their paths."""
    schema = {"apiVersion!": ("ray.io/v1",), "kind!": tuple(SPECS), "metadata!": {"name!": str}}
    kind = resource.get("kind", "?")
    return list(_check(resource, schema | {"spec!": SPECS.get(kind, {})}, kind))


def _check(value, schema, path):
    if schema is POD:
        yield from find_pod_errors(value, path)
    elif isinstance(schema, dict):
        yield from _check_map(value, schema, path)
    elif isinstance(schema, list):
        for index, item in enumerate(value if isinstance(value, list) else ["no list"]):
            yield from _check(item, schema[0], f"{path}[{index}]")
    elif schema is STRING_MAP:
        pairs = value.items() if isinstance(value, dict) else [("", value)]
        yield from (f"{path}.{name} is {item!r}, not a string" for name, item in pairs if not isinstance(item, str))
    elif isinstance(schema, tuple):
        if value not in schema:
            yield f"{path} is {value!r}, not one of {schema}"
    elif type(value) is not schema:
        yield f"{path} is {value!r}, not {schema.__name__}"


def _check_map(value, schema, path):
    if not isinstance(value, dict):
        yield f"{path} is not a map"
        return
    fields = {name.rstrip("!"): inner for name, inner in schema.items()}
    yield from (f"{path}.{name} is not a field" for name in value if name not in fields)
    yield from (f"{path}.{name[:-1]} is missing" for name in schema if name.endswith("!") and name[:-1] not in value)
    for name in value.keys() & fields.keys():
        yield from _check(value[name], fields[name], f"{path}.{name}")


def find_pod_errors(template, path):
    """Yield the errors in a pod template, by Kubernetes' schema."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
    try:
        kubernetes_validate.validate(pod, "1.33", strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{path}: {error}"


def find_crd_errors(resource, text):
    """Return the errors in a resource, by the CustomResourceDefinition `text`; unknown fields are errors."""
    definition = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
    schema = _forbid_unknown_fields(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(resource)]


def _forbid_unknown_fields(schema):
    if isinstance(schema, list):
        return [_forbid_unknown_fields(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _forbid_unknown_fields(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        strict.setdefault("additionalProperties", False)
    return strict
