"""Converts chunks with their times to subtitle cues.

Cues do not overlap and have at most two lines of 42 columns (wide characters take two). A chunk's time is divided among
its cues by the length of their text. The cues contain exactly the words of the chunks. Does not depend on file formats.
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
    """A chunk: its text with tags, its times, and the speaker at its start, if any."""

    text: str
    start_s: float
    end_s: float
    speaker: str | None = None


@dataclasses.dataclass(frozen=True)
class Cue:
    """Lines shown during [start_ms, end_ms); `opens` if a turn starts here."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]
    speaker: str | None
    opens: bool


def make_cues(
    chunks: Iterable[TimedChunk], name: Callable[[str], str], prefix: Callable[[str], str] | None = None
) -> list[Cue]:
    """Return the cues of a recording.

    Args:
        chunks: in order; those without duration are skipped.
        name: returns a speaker's name for a tag.
        prefix: returns what precedes a turn's text, for its speaker's name.
    """
    result: list[Cue] = []
    clock_ms, current = 0, None
    for chunk in chunks:
        if chunk.end_s <= chunk.start_s:
            continue
        start_ms = max(round(chunk.start_s * 1000), clock_ms)
        end_ms = max(round(chunk.end_s * 1000), start_ms + 1)
        pages = []
        for speaker, text in _utterances(chunk, name):
            opens = speaker is not None and speaker != current
            current = speaker
            lead = prefix(speaker) if opens and prefix and speaker is not None else ""
            pages += [(lines, speaker, opens and number == 0) for number, lines in enumerate(pack(lead + text))]
        if not pages:
            continue
        pages = _merge_pages(pages, end_ms - start_ms)
        edges = _divide(start_ms, end_ms, [_count_letters(lines) for lines, _, _ in pages])
        result += [Cue(start, stop, *page) for start, stop, page in zip(edges, edges[1:], pages, strict=False)]
        clock_ms = end_ms
    return result


def pack(text: str) -> Iterator[tuple[str, ...]]:
    """Yield pages of at most two lines, which end with a sentence or a clause if possible."""
    units = list(_units(text))
    while units:
        count = _count_fitting(units)
        if count < len(units):
            count = _best_end(units, count)
        yield _lines(units[:count])
        units = units[count:]


def columns(text: str) -> int:
    """Return the width of a line in columns."""
    return sum(_columns(letter) for letter in text)


Page = tuple[tuple[str, ...], str | None, bool]


def _utterances(chunk: TimedChunk, name: Callable[[str], str]) -> Iterator[tuple[str | None, str]]:
    """Yield the speakers of a chunk with their text."""
    text = _SOUND_END.sub(" ", _SOUND.sub(r" \1 ", chunk.text))
    first, *rest = SPEAKER_TAG.split(text)
    if first.strip():
        yield chunk.speaker, first
    for tag, said in zip(rest[::2], rest[1::2], strict=True):
        if said.strip():
            yield name(tag), said


def _units(text: str) -> Iterator[tuple[str, str]]:
    """Yield unbreakable units, each with the space before it, if any."""
    for word in text.split():
        glue = " "
        for unit in _UNITS.findall(word):
            for piece in _slices(unit):
                yield glue, piece
                glue = ""


def _slices(unit: str) -> Iterator[str]:
    """Split a unit that is longer than a line."""
    piece, width = "", 0
    for letter in unit:
        more = _columns(letter)
        if width + more > LINE_COLUMNS:
            yield piece
            piece, width = "", 0
        piece, width = piece + letter, width + more
    yield piece


def _count_fitting(units: Sequence[tuple[str, str]]) -> int:
    """Return how many units fit into two lines."""
    line, width = 1, 0
    for count, (glue, unit) in enumerate(units):
        more = columns(unit) + (len(glue) if width else 0)
        if width + more > LINE_COLUMNS:
            if line == 2:
                return count
            line, more, width = 2, columns(unit), 0
        width += more
    return len(units)


def _best_end(units: Sequence[tuple[str, str]], most: int) -> int:
    """Return the last end of a sentence, else of a clause, in the second half of what fits; else all that fits."""
    for pattern in (_SENTENCE_END, _CLAUSE_END):
        for count in range(most, most // 2, -1):
            if pattern.search(units[count - 1][1]):
                return count
    return most


def _lines(units: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return one line if possible, else two of the most similar width."""
    line = _joined(units)
    if columns(line) <= LINE_COLUMNS:
        return (line,)
    pairs = [(_joined(units[:at]), _joined(units[at:])) for at in range(1, len(units))]
    return min(pairs, key=lambda pair: max(map(columns, pair)))


def _joined(units: Sequence[tuple[str, str]]) -> str:
    return "".join(glue + unit for glue, unit in units).strip()


def _merge_pages(pages: list[Page], most: int) -> list[Page]:
    """Merge pages until there are no more than milliseconds to show them."""
    while len(pages) > most:
        (lines, speaker, opens), (more, _, _) = pages[-2:]
        pages = [*pages[:-2], ((*lines, *more), speaker, opens)]
    return pages


def _divide(start_ms: int, end_ms: int, weights: Sequence[int]) -> list[int]:
    """Divide a time span in proportion to weights, with at least a millisecond each; return the boundaries."""
    total, count = sum(weights), len(weights)
    edges, sofar = [start_ms], 0
    for number, weight in enumerate(weights, start=1):
        sofar += weight
        edge = start_ms + (end_ms - start_ms) * sofar // total
        edges.append(min(max(edge, edges[-1] + 1), end_ms - (count - number)))
    return edges


def _count_letters(lines: Sequence[str]) -> int:
    return max(sum(not letter.isspace() for line in lines for letter in line), 1)


def _columns(letter: str) -> int:
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
