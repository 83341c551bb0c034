"""Encodes the recordings of the dataset as codes, and writes the manifests that the model is trained on.

In: manifests of recordings, and a trained codec. Out: a `.npy` file of codes (K, T) per utterance, and manifests that
refer to them; the one for training also contains conversations. Existing files are reused, so the same call resumes
after a stop.
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
from jobs.demo import dataset
from jobs.demo.conversations import build_conversations


def encode_dataset(
    recordings: Path,
    output: Path,
    target_codes: Callable[[Tensor], Tensor],
    codec: HiggsAudioCodec,
    num_conversations: int,
    seed: int,
) -> None:
    """Write the codes and manifests of all splits.

    Args:
        recordings: folder written by `dataset.synthesize_dataset`.
        output: folder for codes and manifests.
        target_codes: maps samples (N,) to the codes (K, T) that the codec's decoder was trained on.
        codec: codec whose encoder approximates those codes. References are encoded with it, here as in inference.
        num_conversations: conversations in the training split.
        seed: seed of the conversations.
    """
    for split in dataset.SPLITS:
        if not (output / f"{split}.jsonl").exists():
            count = num_conversations if split == "train" else 0
            _encode_split(recordings, output, split, target_codes, codec, count, seed)


def _encode_split(
    recordings: Path,
    output: Path,
    split: str,
    target_codes: Callable[[Tensor], Tensor],
    codec: HiggsAudioCodec,
    num_conversations: int,
    seed: int,
) -> None:
    (output / split).mkdir(parents=True, exist_ok=True)
    recording_rows = {
        str(output / split / f"{row['id']}.npy"): row for row in dataset.read_rows(recordings / f"{split}.jsonl")
    }
    rows: list[dict[str, Any]] = [row | {"audio": path} for path, row in recording_rows.items()]
    references: dict[str, str] = {}

    def reference_path(row: Mapping[str, Any]) -> str:
        path = str(Path(row["audio"]).with_suffix(".encoded.npy"))
        references[path] = recording_rows[row["audio"]]["audio"]
        return path

    rows += list(build_conversations(rows, num_conversations, seed, reference_path))
    for path, row in recording_rows.items():
        _save_codes(Path(path), row["audio"], lambda samples, _: target_codes(torch.from_numpy(samples)))
    for path, recording in references.items():
        _save_codes(Path(path), recording, codec.encode)
    dataset.write_rows(output / f"{split}.jsonl", rows)


def _save_codes(path: Path, recording: str, encode: Callable[[Any, int], Tensor]) -> None:
    """Encode a recording and write its codes atomically."""
    if path.exists():
        return
    samples, rate_hz = soundfile.read(recording, dtype="float32")
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        np.save(file, encode(samples, rate_hz).numpy().astype(np.int16))
    unfinished.rename(path)
