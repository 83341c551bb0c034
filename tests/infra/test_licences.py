"""THIRD_PARTY.md lists every dependency with the licence that its package declares."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTICES = (ROOT / "THIRD_PARTY.md").read_text()
FAMILIES = ("LGPL", "GPL", "Apache", "BSD", "MIT", "Zlib", "MPL")
MAY_BE_OMITTED = {"Zlib", "MIT", "BSD"}
"""Families that need not be listed if a package declares several."""


def declared_families(package):
    """Return the licence families that a package declares."""
    metadata = importlib.metadata.metadata(package)
    classifiers = [value for value in metadata.get_all("Classifier") or [] if value.startswith("License")]
    text = " ".join([metadata.get("License-Expression") or metadata.get("License") or "", *classifiers])
    return parse_families(text)


def parse_families(text):
    """Return the licence families that a text mentions."""
    return {name for name in FAMILIES if re.search(rf"(?<![A-Z]){name}", text)}


def test_every_dependency_is_listed_with_its_licence():
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    rows = [row.split("|")[1:4] for row in NOTICES.splitlines() if row.startswith("| ")]
    licences = {name.strip(): parse_families(licence) for names, licence, _ in rows for name in names.split(",")}
    for requirement in requirements:
        name = re.match(r"[\w-]+", requirement)[0]
        assert name in licences, f"{name} is not in THIRD_PARTY.md"
        listed, declared = licences[name], declared_families(name)
        assert listed & declared, (name, listed, declared)
        assert declared - MAY_BE_OMITTED <= listed, (name, listed, declared)


def test_model_licence_has_the_same_name_everywhere():
    from jobs.synthesize.cli import MODEL_LICENCE

    assert MODEL_LICENCE in NOTICES
    assert MODEL_LICENCE in (ROOT / "README.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
