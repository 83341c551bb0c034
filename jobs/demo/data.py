"""Spoken sentences on disk: what the demo's codec and model are trained and judged with.

In: how many sentences of each language, and a seed. Out: a folder with `audio/ID.wav` and manifests as a training reads
them, with `id`, `text`, `language`, `speaker`, `audio` and `duration_s`: `train.jsonl`; `text.jsonl`, new sentences in
known voices; `voice.jsonl`, new sentences in new voices. No sentence is in two rows. The same arguments make the same
bytes.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import soundfile

from jobs.demo.sentences import Grammar
from jobs.demo.teacher import SAMPLE_RATE_HZ, check_synthesizers, speak
from jobs.demo.voices import VOICES, Voice
from jobs.storage.backends import open_storage


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One sentence in one voice, not yet spoken."""

    id: str
    text: str
    language: str
    voice: Voice
    split: str


SPLITS = ("text", "voice", "train")
"""Held-out sentences come first, so that more training changes none of them."""


def choose(counts: dict[str, int], held_out: int, seed: int) -> Iterator[Utterance]:
    """Who says what.

    Args:
        counts: training sentences of each language.
        held_out: sentences of each language in each of the splits `text` and `voice`.
    """
    for language, count in counts.items():
        draw = random.Random(seed)
        sentences = Grammar.of(language).sentences(seed)
        for split in SPLITS:
            voices = [one for one in VOICES if language in one.accents and one.held_out == (split == "voice")]
            shares = [one.share for one in voices]
            for index in range(count if split == "train" else held_out):
                voice = draw.choices(voices, shares)[0]
                yield Utterance(f"{language}-{split}-{index:05d}", next(sentences), language, voice, split)


def make(folder: Path, counts: dict[str, int], held_out: int, seed: int, threads: int = 2) -> None:
    """Speak them all. Nothing is done when they are there; what is there of them is not spoken again."""
    if finished(folder):
        return
    check_synthesizers()
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    with ThreadPoolExecutor(threads) as pool:
        utterances = list(choose(counts, held_out, seed))
        for utterance, row in zip(utterances, pool.map(lambda one: _write(folder, one), utterances), strict=True):
            rows[utterance.split].append(row)
    for split, told in rows.items():
        write_rows(folder / f"{split}.jsonl", told)


def finished(folder: Path) -> bool:
    """Whether there is a manifest of each split."""
    return all((folder / f"{split}.jsonl").exists() for split in SPLITS)


def read_rows(manifest: Path) -> Iterator[dict[str, Any]]:
    """The rows of a manifest."""
    with manifest.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


def write_rows(manifest: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a manifest, whole or not at all."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    open_storage(str(manifest.parent)).write(manifest.name, lines.encode())


def _write(folder: Path, utterance: Utterance) -> dict[str, Any]:
    audio = folder.absolute() / "audio" / f"{utterance.id}.wav"
    if not audio.exists():
        samples = speak(utterance.voice, utterance.language, utterance.text)
        unfinished = audio.with_suffix(".part")
        soundfile.write(unfinished, samples, SAMPLE_RATE_HZ, subtype="PCM_16", format="WAV")
        unfinished.rename(audio)
    return {
        "id": utterance.id,
        "text": utterance.text,
        "language": utterance.language,
        "speaker": utterance.voice.name,
        "audio": str(audio),
        "duration_s": round(soundfile.info(audio).duration, 3),
    }
