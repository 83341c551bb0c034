"""The spoken sentences as codes, and as what a model learns from them.

In: manifests of recordings, and a codec that has been taught. Out: a `.npy` file of (K, T) codes an utterance, and
manifests that name them; that of the sentences to train on has conversations, too. Killed, it goes on where it was:
what is there is not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from higgs_model.codec.codec import HiggsAudioCodec
from jobs.demo import data
from jobs.demo.conversations import conversations


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
        if not (folder / f"{split}.jsonl").exists():
            _make_split(spoken, folder, split, taught, codec, count if split == "train" else 0, seed)


def _make_split(
    spoken: Path,
    folder: Path,
    split: str,
    taught: Callable[[Tensor], Tensor],
    codec: HiggsAudioCodec,
    count: int,
    seed: int,
) -> None:
    (folder / split).mkdir(parents=True, exist_ok=True)
    told = data.read_rows(spoken / f"{split}.jsonl")
    recordings = {str(folder / split / f"{row['id']}.npy"): row for row in told}
    rows: list[dict[str, Any]] = [row | {"audio": path} for path, row in recordings.items()]
    shown: dict[str, str] = {}

    def heard(row: Mapping[str, Any]) -> str:
        path = str(Path(row["audio"]).with_suffix(".heard.npy"))
        shown[path] = recordings[row["audio"]]["audio"]
        return path

    rows += list(conversations(rows, count, seed, heard))
    for path, row in recordings.items():
        _save(Path(path), row["audio"], lambda samples, _: taught(torch.from_numpy(samples)))
    for path, recording in shown.items():
        _save(Path(path), recording, codec.encode)
    data.write_rows(folder / f"{split}.jsonl", rows)


def _save(path: Path, recording: str, codes: Callable[[Any, int], Tensor]) -> None:
    """Write the codes of a recording, whole or not at all."""
    if path.exists():
        return
    samples, rate_hz = soundfile.read(recording, dtype="float32")
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        np.save(file, codes(samples, rate_hz).numpy().astype(np.int16))
    unfinished.rename(path)
