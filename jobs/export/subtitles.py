"""Subtitles, one file per script: SubRip (`.srt`) and WebVTT (`.vtt`), in the same folders as the audio files.

    audio/3f/chapter-01.wav  ─▶  audio/3f/chapter-01.vtt

In WebVTT, the speaker is the cue's voice (`<v Ann>`). SubRip has no voices, so a name precedes each turn if a script
has several speakers.
"""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Callable, Iterable
from typing import Literal

from jobs.export.cues import Cue, TimedChunk, make_cues
from jobs.export.recordings import Recording, Recordings
from jobs.storage.backends import StorageBackend

Kind = Literal["srt", "vtt"]

_CONCURRENT_FILES = 16
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def write_subtitles(recordings: Recordings, output: StorageBackend, kind: Kind) -> int:
    """Write a file for each recording; return their number."""

    def write(recording: Recording) -> None:
        output.write(f"{recording.name.rpartition('.')[0]}.{kind}", subtitles(recording, kind).encode())

    waiting = iter(recordings)
    # Small files mostly wait for storage.
    with concurrent.futures.ThreadPoolExecutor(_CONCURRENT_FILES) as pool:
        while batch := list(itertools.islice(waiting, _CONCURRENT_FILES * 8)):
            list(pool.map(write, batch))
    return len(recordings)


def subtitles(recording: Recording, kind: Kind) -> str:
    """Return the subtitles of one recording."""
    chunks = recording.row["chunks"]
    several = len({name for chunk in chunks for name in chunk["speakers"]}) > 1
    chunks_with_times = (
        TimedChunk(chunk["text"], chunk["start_s"], chunk["end_s"], (chunk["speakers"] or [None])[0])
        for chunk in chunks
    )
    names = recording.script.speaker_name
    if kind == "vtt":
        return _vtt(make_cues(chunks_with_times, names))
    prefix: Callable[[str], str] | None = (lambda name: f"{name}: ") if several else None
    return _srt(make_cues(chunks_with_times, names, prefix))


def _vtt(cues: Iterable[Cue]) -> str:
    blocks = ["WEBVTT\n"]
    for cue in cues:
        text = "\n".join(cue.lines).translate(_ENTITIES)
        voice = f"<v {' '.join(cue.speaker.split()).translate(_ENTITIES)}>" if cue.speaker else ""
        blocks.append(f"{_timestamp(cue.start_ms, '.')} --> {_timestamp(cue.end_ms, '.')}\n{voice}{text}\n")
    return "\n".join(blocks)


def _srt(cues: Iterable[Cue]) -> str:
    blocks = []
    for number, cue in enumerate(cues, start=1):
        # Parsers recognize the line with times by its arrow.
        text = "\n".join(cue.lines).replace("-->", "→")
        blocks.append(f"{number}\n{_timestamp(cue.start_ms, ',')} --> {_timestamp(cue.end_ms, ',')}\n{text}\n")
    return "\n".join(blocks)


def _timestamp(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{point}{rest:03d}"
