"""The spoken sentences as codes, and as what a model learns from them.

In: manifests of recordings, and a codec that has been taught. Out: a `.npy` file of (K, T) codes an utterance, and
manifests that name them; that of the sentences to train on has conversations, too. Killed, it goes on where it was:
what is there is not made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from higgs_model.codec.codec import HiggsAudioCodec
from jobs.demo import data
from jobs.demo.conversations import conversations


def finished(folder: Path) -> bool:
    """Whether nothing is left to make."""
    return all((folder / f"{split}.jsonl").exists() for split in data.SPLITS)


def make(
    spoken: Path, folder: Path, taught: Callable[[Tensor], Tensor], codec: HiggsAudioCodec, count: int, seed: int
) -> None:
    """Write the codes of all splits.

    Args:
        spoken: the folder that `data.make` has filled.
        taught: gives the codes (K, T) that the decoder was taught to speak for samples (N,).
        codec: its encoder comes near these; that is how references will be heard, and how conversations hear them.
        count: conversations.
    """
    for split in data.SPLITS:
        manifest = folder / f"{split}.jsonl"
        if manifest.exists():
            continue
        (folder / split).mkdir(parents=True, exist_ok=True)
        recordings = {str(folder / split / f"{row['id']}.npy"): row for row in read_rows(spoken / f"{split}.jsonl")}
        rows: list[dict[str, Any]] = [row | {"audio": path} for path, row in recordings.items()]
        shown: dict[str, str] = {}

        def heard(row: Mapping[str, Any], shown: dict[str, str] = shown) -> str:
            path = str(Path(row["audio"]).with_suffix(".heard.npy"))
            shown[path] = row["audio"]
            return path

        if split == "train":
            rows += list(conversations(rows, count, seed, heard))
        for path, row in recordings.items():
            _save(Path(path), row["audio"], lambda samples, _: taught(torch.from_numpy(samples)))
        for path, same in shown.items():
            _save(Path(path), recordings[same]["audio"], codec.encode)
        unfinished = manifest.with_suffix(".part")
        unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        unfinished.rename(manifest)


def read_rows(manifest: Path) -> Iterator[dict[str, Any]]:
    """The rows of a manifest."""
    with manifest.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


def _save(path: Path, recording: str, codes: Callable[[Any, int], Tensor]) -> None:
    """Write the codes of a recording, whole or not at all."""
    if path.exists():
        return
    samples, rate_hz = soundfile.read(recording, dtype="float32")
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        np.save(file, codes(samples, rate_hz).numpy().astype(np.int16))
    unfinished.rename(path)
