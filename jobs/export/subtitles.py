"""Subtitles, a file a script: SubRip (`.srt`) and WebVTT (`.vtt`), laid out as the audio files are.

    audio/3f/chapter-01.wav  ─▶  audio/3f/chapter-01.vtt

In WebVTT a speaker is the cue's voice (`<v Ann>`); in SubRip, which knows none, a name stands in front of a turn where
a script has several speakers.
"""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Callable, Iterable
from typing import Literal

from jobs.export.cues import Cue, Spoken, cues
from jobs.export.recordings import Recording, Recordings
from jobs.storage.backends import StorageBackend

Kind = Literal["srt", "vtt"]

_FILES_AT_ONCE = 16
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def write_subtitles(recordings: Recordings, output: StorageBackend, kind: Kind) -> int:
    """Write a file for each recording; gives their number."""

    def write(recording: Recording) -> None:
        output.write(f"{recording.name.rpartition('.')[0]}.{kind}", subtitles(recording, kind).encode())

    waiting = iter(recordings)
    # Most of a small file's time is waiting for the disk or the bucket.
    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        while some := list(itertools.islice(waiting, _FILES_AT_ONCE * 8)):
            list(pool.map(write, some))
    return len(recordings)


def subtitles(recording: Recording, kind: Kind) -> str:
    """The subtitles of one recording."""
    chunks = recording.row["chunks"]
    several = len({name for chunk in chunks for name in chunk["speakers"]}) > 1
    spoken = (
        Spoken(chunk["text"], chunk["start_s"], chunk["end_s"], (chunk["speakers"] or [None])[0]) for chunk in chunks
    )
    names = recording.script.speaker_name
    if kind == "vtt":
        return _vtt(cues(spoken, names))
    prefix: Callable[[str], str] | None = (lambda name: f"{name}: ") if several else None
    return _srt(cues(spoken, names, prefix))


def _vtt(made: Iterable[Cue]) -> str:
    blocks = ["WEBVTT\n"]
    for cue in made:
        text = "\n".join(cue.lines).translate(_ENTITIES)
        voice = f"<v {' '.join(cue.speaker.split()).translate(_ENTITIES)}>" if cue.speaker else ""
        blocks.append(f"{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}\n{voice}{text}\n")
    return "\n".join(blocks)


def _srt(made: Iterable[Cue]) -> str:
    blocks = []
    for number, cue in enumerate(made, start=1):
        # An arrow is what readers know the line of times by.
        text = "\n".join(cue.lines).replace("-->", "→")
        blocks.append(f"{number}\n{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}\n{text}\n")
    return "\n".join(blocks)


def _clock(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{point}{rest:03d}"
