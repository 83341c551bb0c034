"""The demo dataset: synthesized sentences on disk that the demo's codec and model are trained and evaluated on.

In: the number of sentences per language, and a seed. Out: a folder with `audio/ID.wav` and training manifests with
`id`, `text`, `language`, `speaker`, `audio` and `duration_s`: `train.jsonl`; `text.jsonl` (unseen sentences, training
voices); `voice.jsonl` (unseen sentences, held-out voices). No sentence occurs twice. The same arguments produce the
same bytes.
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
from jobs.demo.teacher import SAMPLE_RATE_HZ, check_synthesizers, synthesize
from jobs.demo.voices import VOICES, Voice
from jobs.storage.backends import open_storage


@dataclasses.dataclass(frozen=True)
class Utterance:
    """A sentence to be synthesized in a voice."""

    id: str
    text: str
    language: str
    voice: Voice
    split: str


SPLITS = ("text", "voice", "train")
"""Held-out splits come first, so that they stay the same when training data is added."""


def draw_utterances(counts: dict[str, int], held_out: int, seed: int) -> Iterator[Utterance]:
    """Draw the sentences and voices of all splits.

    Args:
        counts: training sentences per language.
        held_out: sentences per language in each of the splits `text` and `voice`.
        seed: seed of all draws.
    """
    for language, count in counts.items():
        draw = random.Random(seed)
        sentences = Grammar.load(language).sentences(seed)
        for split in SPLITS:
            voices = [voice for voice in VOICES if language in voice.accents and voice.held_out == (split == "voice")]
            weights = [voice.weight for voice in voices]
            for index in range(count if split == "train" else held_out):
                voice = draw.choices(voices, weights)[0]
                yield Utterance(f"{language}-{split}-{index:05d}", next(sentences), language, voice, split)


def synthesize_dataset(folder: Path, counts: dict[str, int], held_out: int, seed: int, threads: int = 2) -> None:
    """Synthesize all utterances and write the manifests; existing recordings are reused."""
    if is_complete(folder):
        return
    check_synthesizers()
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    with ThreadPoolExecutor(threads) as pool:
        utterances = list(draw_utterances(counts, held_out, seed))
        written = pool.map(lambda utterance: _write_recording(folder, utterance), utterances)
        for utterance, row in zip(utterances, written, strict=True):
            rows[utterance.split].append(row)
    for split, split_rows in rows.items():
        write_rows(folder / f"{split}.jsonl", split_rows)


def is_complete(folder: Path) -> bool:
    """Return whether the folder has the manifest of each split."""
    return all((folder / f"{split}.jsonl").exists() for split in SPLITS)


def read_rows(manifest: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON-lines manifest."""
    with manifest.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


def write_rows(manifest: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON-lines manifest atomically."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    open_storage(str(manifest.parent)).write(manifest.name, lines.encode())


def _write_recording(folder: Path, utterance: Utterance) -> dict[str, Any]:
    audio = folder.absolute() / "audio" / f"{utterance.id}.wav"
    if not audio.exists():
        samples = synthesize(utterance.voice, utterance.language, utterance.text)
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
