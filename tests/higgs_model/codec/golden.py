"""Tiny checkpoints in the original layout, and the outputs of the reference implementation for them.

`checkpoints.json` lists the tensors of each checkpoint; their values are derived from their names and need not be
stored. `reference.npz` has the reference's codes, samples and losses for `recording`s, which are integers from NumPy's
frozen random stream.
"""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).parents[2] / "golden" / "codec"
LENGTHS = (700, 959, 960, 961, 2879, 4801, 9600, 14399, 23456, 30719)
NAMES = ("rvq_24khz", "rvq_16khz", "rfsq_24khz", "wavlm_avg_24khz")
"""Eight codebooks at 25 frames per second; twelve at 50; finite scalar; nine with WavLM and averaged features."""


@functools.cache
def reference() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "reference.npz") as arrays:
        return dict(arrays)


@functools.cache
def manifest() -> dict[str, Any]:
    return json.loads((FOLDER / "checkpoints.json").read_text())


def recording(num_samples: int, seed: int = 0) -> np.ndarray:
    """Low-pass noise, bit-identical on every machine."""
    steps = np.random.RandomState(seed).randint(-3000, 3000, num_samples + 14)
    box = np.ones(8, np.int64)
    smooth = np.convolve(np.convolve(steps, box, "valid"), box, "valid")
    return (smooth // 8 / 32768.0).astype(np.float32)


def write_original(name: str, folder: Path) -> Path:
    """Write a checkpoint in the original layout."""
    entry = manifest()[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(entry["config"]))
    (folder / "semantic_config.json").write_text(json.dumps(entry["semantic_config"]))
    tensors = {key: torch.from_numpy(np.asarray(_values(key, shape))) for key, shape in entry["tensors"].items()}
    torch.save(tensors, folder / "model.pth")
    return folder


def _values(name: str, shape: list[int]) -> np.ndarray:
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("inited", "cluster_size"):
        return np.ones(shape, np.float32)
    if leaf in ("weight_g", "original0"):
        # The last convolution is quiet, so that samples stay within ±1.
        return np.full(shape, 0.1, np.float32) if max(shape) == 1 else 0.4 * np.abs(1 + 0.2 * noise)
    if leaf == "alpha":
        return np.abs(1 + 0.2 * noise) + np.float32(0.1)
    if leaf == "bias":
        return np.float32(0.1) * noise
    if leaf in ("embed", "embed_avg"):
        return np.float32(0.7) * noise
    if "layer_norm" in name and leaf == "weight":
        return 1 + np.float32(0.1) * noise
    fan_in = int(np.prod(shape[1:])) or 1
    return noise / np.float32(fan_in) ** np.float32(0.5)
