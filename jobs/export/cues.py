"""Converts timed chunks to subtitle cues, independent of file formats.

Cues do not overlap, and contain exactly the words of the chunks in at most two lines of 42 columns (a wide character
takes two). The time of a chunk is divided among its cues in proportion to the length of their text.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

from higgs_model.script.chunking import SPEAKER_TAG

LINE_COLUMNS = 42

_SOUND = re.compile(r"<SE(?:_s)?>(\[[^<]{0,80}\])</SE(?:_s)?>")
_SOUND_END = re.compile(r"<SE_e>[^<]{0,80}</SE_e>")
_WIDE = (
    "\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6\U00020000-\U0003fffd"
)
_UNITS = re.compile(rf"[{_WIDE}][^\w\s]*|[^{_WIDE}\s]+")
_SENTENCE_END, _CLAUSE_END = re.compile(r"[.!?…。！？][\"'”’)]*$"), re.compile(r"[,;:，；：、–—-][\"'”’)]*$")


@dataclasses.dataclass(frozen=True)
class TimedChunk:
    """A chunk with its text, including tags, its times, and the speaker at its start, if any."""

    text: str
    start_s: float
    end_s: float
    speaker: str | None = None


@dataclasses.dataclass(frozen=True)
class Cue:
    """Lines shown during [start_ms, end_ms), and whether a turn starts with them."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]
    speaker: str | None
    starts_turn: bool


def make_cues(
    chunks: Iterable[TimedChunk], name: Callable[[str], str], prefix: Callable[[str], str] | None = None
) -> list[Cue]:
    """Return the cues of a recording.

    Args:
        chunks: chunks in order; those without duration are skipped.
        name: function from a speaker tag to the speaker's name.
        prefix: function from a speaker's name to a prefix for the text of the speaker's turns.
    """
    result: list[Cue] = []
    last_end_ms, current_speaker = 0, None
    for chunk in chunks:
        if chunk.end_s <= chunk.start_s:
            continue
        start_ms = max(round(chunk.start_s * 1000), last_end_ms)
        end_ms = max(round(chunk.end_s * 1000), start_ms + 1)
        pages = []
        for speaker, text in _split_speakers(chunk, name):
            starts_turn = speaker is not None and speaker != current_speaker
            current_speaker = speaker
            lead = prefix(speaker) if starts_turn and prefix and speaker is not None else ""
            pages += [
                (lines, speaker, starts_turn and number == 0) for number, lines in enumerate(paginate(lead + text))
            ]
        if not pages:
            continue
        pages = _merge_pages(pages, end_ms - start_ms)
        boundaries = _divide_time(start_ms, end_ms, [_count_chars(lines) for lines, _, _ in pages])
        result += [
            Cue(start, stop, *page) for start, stop, page in zip(boundaries, boundaries[1:], pages, strict=False)
        ]
        last_end_ms = end_ms
    return result


def paginate(text: str) -> Iterator[tuple[str, ...]]:
    """Yield pages of at most two lines, which end at the end of a sentence or clause if possible."""
    units = list(_split_units(text))
    while units:
        count = _count_fitting(units)
        if count < len(units):
            count = _find_break(units, count)
        yield _break_lines(units[:count])
        units = units[count:]


def display_width(text: str) -> int:
    """Return the width of a line in columns."""
    return sum(_char_width(char) for char in text)


Page = tuple[tuple[str, ...], str | None, bool]
"""Lines, speaker, and whether a turn starts."""


def _split_speakers(chunk: TimedChunk, name: Callable[[str], str]) -> Iterator[tuple[str | None, str]]:
    """Yield each speaker in a chunk with the text up to the next one."""
    text = _SOUND_END.sub(" ", _SOUND.sub(r" \1 ", chunk.text))
    first, *rest = SPEAKER_TAG.split(text)
    if first.strip():
        yield chunk.speaker, first
    for tag, spoken in zip(rest[::2], rest[1::2], strict=True):
        if spoken.strip():
            yield name(tag), spoken


def _split_units(text: str) -> Iterator[tuple[str, str]]:
    """Yield unbreakable units, each with the space before it, if any."""
    for word in text.split():
        space = " "
        for unit in _UNITS.findall(word):
            for piece in _split_long_unit(unit):
                yield space, piece
                space = ""


def _split_long_unit(unit: str) -> Iterator[str]:
    """Yield a unit, in pieces if it is longer than a line."""
    piece, width = "", 0
    for char in unit:
        char_width = _char_width(char)
        if width + char_width > LINE_COLUMNS:
            yield piece
            piece, width = "", 0
        piece, width = piece + char, width + char_width
    yield piece


def _count_fitting(units: Sequence[tuple[str, str]]) -> int:
    """Return the number of units that fit into two lines."""
    line, width = 1, 0
    for count, (space, unit) in enumerate(units):
        added = display_width(unit) + (len(space) if width else 0)
        if width + added > LINE_COLUMNS:
            if line == 2:
                return count
            line, added, width = 2, display_width(unit), 0
        width += added
    return len(units)


def _find_break(units: Sequence[tuple[str, str]], limit: int) -> int:
    """Return the number of units of the next page, which fits at most `limit`.

    The page ends at the last sentence end in its second half, else at the last clause end there, else at the limit.
    """
    for pattern in (_SENTENCE_END, _CLAUSE_END):
        for count in range(limit, limit // 2, -1):
            if pattern.search(units[count - 1][1]):
                return count
    return limit


def _break_lines(units: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return one line if possible, else two lines of the most similar width."""
    line = _join_units(units)
    if display_width(line) <= LINE_COLUMNS:
        return (line,)
    pairs = [(_join_units(units[:index]), _join_units(units[index:])) for index in range(1, len(units))]
    return min(pairs, key=lambda pair: max(map(display_width, pair)))


def _join_units(units: Sequence[tuple[str, str]]) -> str:
    return "".join(space + unit for space, unit in units).strip()


def _merge_pages(pages: list[Page], duration_ms: int) -> list[Page]:
    """Merge the last pages until each page has at least a millisecond."""
    while len(pages) > duration_ms:
        (lines, speaker, starts_turn), (next_lines, _, _) = pages[-2:]
        pages = [*pages[:-2], ((*lines, *next_lines), speaker, starts_turn)]
    return pages


def _divide_time(start_ms: int, end_ms: int, weights: Sequence[int]) -> list[int]:
    """Divide a time span in proportion to weights, with at least a millisecond each; return the boundaries."""
    total, count = sum(weights), len(weights)
    boundaries, cumulative = [start_ms], 0
    for number, weight in enumerate(weights, start=1):
        cumulative += weight
        boundary = start_ms + (end_ms - start_ms) * cumulative // total
        boundaries.append(min(max(boundary, boundaries[-1] + 1), end_ms - (count - number)))
    return boundaries


def _count_chars(lines: Sequence[str]) -> int:
    return max(sum(not char.isspace() for line in lines for char in line), 1)


def _char_width(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
