"""What is shown while a recording plays: chunks and their times in, `Cue`s out.

Cues follow one another, each with a time of its own, at most two lines of 42 columns (wide characters take two). A
chunk's time is shared out among its cues by how much each has to say. Nothing is lost: the cues' words are the chunks'
words. Knows no file format.
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
class Spoken:
    """A chunk: its text with tags, when it is heard, and whose turn it is at its beginning, if anybody's."""

    text: str
    start_s: float
    end_s: float
    speaker: str | None = None


@dataclasses.dataclass(frozen=True)
class Cue:
    """Some lines for some time: [start_ms, end_ms). `opens` says that a turn begins here."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]
    speaker: str | None
    opens: bool


def cues(chunks: Iterable[Spoken], name: Callable[[str], str], prefix: Callable[[str], str] | None = None) -> list[Cue]:
    """Cues of a recording.

    Args:
        chunks: in order; those without any time are not heard, and not shown.
        name: of a speaker, by tag.
        prefix: what stands in front of a turn's text, given its speaker's name.
    """
    made: list[Cue] = []
    clock_ms, heard = 0, None
    for chunk in chunks:
        if chunk.end_s <= chunk.start_s:
            continue
        start_ms = max(round(chunk.start_s * 1000), clock_ms)
        end_ms = max(round(chunk.end_s * 1000), start_ms + 1)
        pages = []
        for speaker, text in _utterances(chunk, name):
            opens = speaker is not None and speaker != heard
            heard = speaker
            front = prefix(speaker) if opens and prefix and speaker is not None else ""
            pages += [(lines, speaker, opens and number == 0) for number, lines in enumerate(pack(front + text))]
        if not pages:
            continue
        pages = _together(pages, end_ms - start_ms)
        edges = _share(start_ms, end_ms, [_letters(lines) for lines, _, _ in pages])
        made += [Cue(start, stop, *page) for start, stop, page in zip(edges, edges[1:], pages, strict=False)]
        clock_ms = end_ms
    return made


def pack(text: str) -> Iterator[tuple[str, ...]]:
    """Text on pages of at most two lines; a page ends where a sentence or a clause does, if it can."""
    units = list(_units(text))
    while units:
        count = _that_fit(units)
        if count < len(units):
            count = _good_end(units, count)
        yield _lines(units[:count])
        units = units[count:]


def columns(text: str) -> int:
    """How wide a line is shown."""
    return sum(_columns(letter) for letter in text)


Page = tuple[tuple[str, ...], str | None, bool]


def _utterances(chunk: Spoken, name: Callable[[str], str]) -> Iterator[tuple[str | None, str]]:
    """Who says what in a chunk."""
    text = _SOUND_END.sub(" ", _SOUND.sub(r" \1 ", chunk.text))
    first, *rest = SPEAKER_TAG.split(text)
    if first.strip():
        yield chunk.speaker, first
    for tag, said in zip(rest[::2], rest[1::2], strict=True):
        if said.strip():
            yield name(tag), said


def _units(text: str) -> Iterator[tuple[str, str]]:
    """What no line may be broken inside of, each with the blank in front of it if there is one."""
    for word in text.split():
        glue = " "
        for unit in _UNITS.findall(word):
            for piece in _slices(unit):
                yield glue, piece
                glue = ""


def _slices(unit: str) -> Iterator[str]:
    """A unit that no line can hold, in pieces that one can."""
    piece, width = "", 0
    for letter in unit:
        more = _columns(letter)
        if width + more > LINE_COLUMNS:
            yield piece
            piece, width = "", 0
        piece, width = piece + letter, width + more
    yield piece


def _that_fit(units: Sequence[tuple[str, str]]) -> int:
    """How many units two lines can hold."""
    line, width = 1, 0
    for count, (glue, unit) in enumerate(units):
        more = columns(unit) + (len(glue) if width else 0)
        if width + more > LINE_COLUMNS:
            if line == 2:
                return count
            line, more, width = 2, columns(unit), 0
        width += more
    return len(units)


def _good_end(units: Sequence[tuple[str, str]], most: int) -> int:
    """The last end of a sentence, or else of a clause, in the second half of what fits; else all that fits."""
    for pattern in (_SENTENCE_END, _CLAUSE_END):
        for count in range(most, most // 2, -1):
            if pattern.search(units[count - 1][1]):
                return count
    return most


def _lines(units: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """One line if it can be, else the two that are most alike in length."""
    whole = _joined(units)
    if columns(whole) <= LINE_COLUMNS:
        return (whole,)
    pairs = [(_joined(units[:at]), _joined(units[at:])) for at in range(1, len(units))]
    return min(pairs, key=lambda pair: max(map(columns, pair)))


def _joined(units: Sequence[tuple[str, str]]) -> str:
    return "".join(glue + unit for glue, unit in units).strip()


def _together(pages: list[Page], most: int) -> list[Page]:
    """No more pages than there are milliseconds to show them in."""
    while len(pages) > most:
        (lines, speaker, opens), (more, _, _) = pages[-2:]
        pages = [*pages[:-2], ((*lines, *more), speaker, opens)]
    return pages


def _share(start_ms: int, end_ms: int, weights: Sequence[int]) -> list[int]:
    """Edges of parts of a time that are as long as their weights are great, and a millisecond at least."""
    total, count = sum(weights), len(weights)
    edges, sofar = [start_ms], 0
    for number, weight in enumerate(weights, start=1):
        sofar += weight
        edge = start_ms + (end_ms - start_ms) * sofar // total
        edges.append(min(max(edge, edges[-1] + 1), end_ms - (count - number)))
    return edges


def _letters(lines: Sequence[str]) -> int:
    return max(sum(not letter.isspace() for line in lines for letter in line), 1)


def _columns(letter: str) -> int:
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
