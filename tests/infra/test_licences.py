"""Licences of dependencies, according to their packages."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTICES = (ROOT / "THIRD_PARTY.md").read_text()
FAMILIES = ("LGPL", "GPL", "Apache", "BSD", "MIT", "Zlib", "MPL")
HARMLESS = {"Zlib", "MIT", "BSD"}
"""Need not be listed."""


def stated(package):
    """Return the licence families that a package declares."""
    metadata = importlib.metadata.metadata(package)
    classifiers = [one for one in metadata.get_all("Classifier") or [] if one.startswith("License")]
    text = " ".join([metadata.get("License-Expression") or metadata.get("License") or "", *classifiers])
    return families(text)


def families(text):
    return {name for name in FAMILIES if re.search(rf"(?<![A-Z]){name}", text)}


def test_every_dependency_is_listed_with_its_licence():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    rows = [row.split("|")[1:4] for row in NOTICES.splitlines() if row.startswith("| ")]
    licences = {name.strip(): families(licence) for names, licence, _ in rows for name in names.split(",")}
    for requirement in needed:
        name = re.match(r"[\w-]+", requirement)[0]
        assert name in licences, f"{name} is not in THIRD_PARTY.md"
        assert licences[name] & stated(name), (name, licences[name], stated(name))
        assert stated(name) - HARMLESS <= licences[name], (name, licences[name], stated(name))


def test_model_licence_has_one_name():
    from jobs.synthesize.cli import MODEL_LICENCE

    assert MODEL_LICENCE in NOTICES
    assert MODEL_LICENCE in (ROOT / "README.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
