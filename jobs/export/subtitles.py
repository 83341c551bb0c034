"""Writes subtitles, one SubRip (`.srt`) or WebVTT (`.vtt`) file per script, in the same subfolders as the audio files.

    audio/3f/chapter-01.wav  ─▶  audio/3f/chapter-01.vtt

In WebVTT, the speaker is a voice tag (`<v Ann>`). SubRip has no such tag, so in scripts with several speakers each turn
starts with the speaker's name.
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
    """Write a subtitle file per recording; return their number."""

    def write(recording: Recording) -> None:
        output.write(f"{recording.name.rpartition('.')[0]}.{kind}", format_subtitles(recording, kind).encode())

    remaining = iter(recordings)
    # Writing small files is mostly waiting for the storage.
    with concurrent.futures.ThreadPoolExecutor(_CONCURRENT_FILES) as pool:
        while batch := list(itertools.islice(remaining, _CONCURRENT_FILES * 8)):
            list(pool.map(write, batch))
    return len(recordings)


def format_subtitles(recording: Recording, kind: Kind) -> str:
    """Return the content of a recording's subtitle file."""
    chunks = recording.row["chunks"]
    has_several_speakers = len({name for chunk in chunks for name in chunk["speakers"]}) > 1
    timed_chunks = (
        TimedChunk(chunk["text"], chunk["start_s"], chunk["end_s"], (chunk["speakers"] or [None])[0])
        for chunk in chunks
    )
    speaker_name = recording.script.speaker_name
    if kind == "vtt":
        return _format_vtt(make_cues(timed_chunks, speaker_name))
    prefix: Callable[[str], str] | None = (lambda name: f"{name}: ") if has_several_speakers else None
    return _format_srt(make_cues(timed_chunks, speaker_name, prefix))


def _format_vtt(cues: Iterable[Cue]) -> str:
    blocks = ["WEBVTT\n"]
    for cue in cues:
        text = "\n".join(cue.lines).translate(_ENTITIES)
        voice = f"<v {' '.join(cue.speaker.split()).translate(_ENTITIES)}>" if cue.speaker else ""
        blocks.append(f"{_timestamp(cue.start_ms, '.')} --> {_timestamp(cue.end_ms, '.')}\n{voice}{text}\n")
    return "\n".join(blocks)


def _format_srt(cues: Iterable[Cue]) -> str:
    blocks = []
    for number, cue in enumerate(cues, start=1):
        # Parsers recognize the timing line by its arrow.
        text = "\n".join(cue.lines).replace("-->", "→")
        blocks.append(f"{number}\n{_timestamp(cue.start_ms, ',')} --> {_timestamp(cue.end_ms, ',')}\n{text}\n")
    return "\n".join(blocks)


def _timestamp(total_ms: int, decimal_mark: str) -> str:
    seconds, ms = divmod(total_ms, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{decimal_mark}{ms:03d}"
