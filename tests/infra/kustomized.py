"""A subset of `kubectl kustomize`, as far as our folders use it; anything else is refused.

Where there is a kubectl, a test compares the two.
"""

import copy

import jsonpatch
import yaml

KNOWN = {"resources", "images", "patches", "configMapGenerator", "generatorOptions"}


def build(folder):
    """Return the resources of a folder in order."""
    wanted = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(wanted) <= KNOWN, f"{folder}: {set(wanted) - KNOWN}"
    found = []
    for name in wanted.get("resources", ()):
        path = folder / name
        found += build(path.resolve()) if path.is_dir() else [copy.deepcopy(one) for one in _documents(path)]
    for one in wanted.get("configMapGenerator", ()):
        assert wanted["generatorOptions"] == {"disableNameSuffixHash": True}
        data = {name: (folder / name).read_text() for name in one["files"]}
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": one["name"]}, "data": data})
    for patch in wanted.get("patches", ()):
        (kind,) = patch["target"].values()
        (number,) = [number for number, one in enumerate(found) if one["kind"] == kind]
        found[number] = jsonpatch.apply_patch(found[number], yaml.safe_load(patch["patch"]))
    for image in wanted.get("images", ()):
        for container in containers(found):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return found


def _documents(path):
    # Through text, so that what one anchor gave to two places are two things.
    return [yaml.safe_load(yaml.dump(one, Dumper=_NoAliases)) for one in yaml.safe_load_all(path.read_text())]


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


def containers(value):
    """Yield every container in resources."""
    if isinstance(value, list):
        for one in value:
            yield from containers(one)
    elif isinstance(value, dict):
        for name, one in value.items():
            if name == "containers":
                yield from one
            else:
                yield from containers(one)
