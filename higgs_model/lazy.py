"""Lazily imported public names of a package (PEP 562)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping


def lazy_getattr(package: str, exports: Mapping[str, str]) -> Callable[[str], object]:
    """Return a module-level `__getattr__` that imports each name on first access.

    Args:
        package: `__name__` of the package.
        exports: the defining module of each public name.
    """

    def get(name: str) -> object:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(exports[name]), name)

    return get
