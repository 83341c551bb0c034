"""The model named `demo`: a small Higgs Audio, trained from scratch, that runs without network access or GPU.

It is an ordinary checkpoint in a folder of this package and is loaded like any other. `jobs.demo` trains it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

NAME = "demo"
CHECKPOINT_DIR = Path(__file__).parent / "checkpoint"


def resolve_model(model: str | Path) -> str | Path:
    """Return the folder of the embedded checkpoint if `model` is its name, else `model` unchanged."""
    return CHECKPOINT_DIR if str(model) == NAME else model


def version() -> str:
    """Return a digest of the weights, which changes with the checkpoint although its name does not."""
    digest = hashlib.sha256()
    for path in sorted(CHECKPOINT_DIR.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
