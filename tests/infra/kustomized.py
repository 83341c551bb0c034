"""The subset of `kubectl kustomize` that the manifests use; other fields raise an error.

If kubectl is installed, a test compares the two.
"""

import jsonpatch
import yaml

SUPPORTED_FIELDS = {"resources", "images", "patches", "configMapGenerator", "generatorOptions"}


def build(folder):
    """Return the resources that the kustomization in `folder` builds, in order."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unsupported = set(kustomization) - SUPPORTED_FIELDS
    assert not unsupported, f"{folder}: {unsupported}"
    resources = []
    for name in kustomization.get("resources", ()):
        path = folder / name
        resources += build(path.resolve()) if path.is_dir() else _load_documents(path)
    for generator in kustomization.get("configMapGenerator", ()):
        assert kustomization["generatorOptions"] == {"disableNameSuffixHash": True}
        data = {name: (folder / name).read_text() for name in generator["files"]}
        metadata = {"name": generator["name"]}
        resources.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    for patch in kustomization.get("patches", ()):
        (kind,) = patch["target"].values()
        (index,) = [index for index, resource in enumerate(resources) if resource["kind"] == kind]
        resources[index] = jsonpatch.apply_patch(resources[index], yaml.safe_load(patch["patch"]))
    for image in kustomization.get("images", ()):
        for container in find_containers(resources):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return resources


def _load_documents(path):
    # Dumped and reloaded, so that aliases of one anchor become separate objects, which patches change independently.
    documents = yaml.safe_load_all(path.read_text())
    return [yaml.safe_load(yaml.dump(document, Dumper=_NoAliases)) for document in documents]


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


def find_containers(value):
    """Yield every container in a list of resources, or in a part of one."""
    if isinstance(value, list):
        for item in value:
            yield from find_containers(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name == "containers":
                yield from item
            else:
                yield from find_containers(item)
