"""The model called `demo`: a small Higgs Audio that was trained from nothing, and speaks without network or GPU.

It is a checkpoint like any other, in a folder of this package, and loaded like any other. How it was made: `jobs.demo`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

NAME = "demo"
FOLDER = Path(__file__).parent / "checkpoint"


def located(model: str | Path) -> str | Path:
    """Where a model is: the demo's folder for its name, anything else as it is."""
    return FOLDER if str(model) == NAME else model


def version() -> str:
    """Changes when the checkpoint does, though its name stays."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
