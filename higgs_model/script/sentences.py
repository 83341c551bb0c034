"""Whole sentences up to a word budget, and the best place to cut a sentence that is longer than that.

Text in, consecutive pieces of it out: joined, they are the text. Sentence boundaries come from Wikimedia's
sentencex, which knows some 300 languages; it is given a window at a time, because on long texts it is not
linear. Knows nothing of speakers or paragraphs.
"""

from __future__ import annotations

import re

from higgs_model.script import languages
from higgs_model.script.languages import count_words

_WINDOW_CHARS = 2000
_PROTECTED = re.compile(r"<SE(?:_[se])?>[^<]{0,80}</SE(?:_[se])?>|\[[^\[\]\n]{0,80}\]")
"""A sound or speaker tag: never cut inside."""

_STRONG, _CLAUSE, _BLANK, _ANYWHERE = 3, 2, 1, 0


def pack(text: str, max_words: int, language: str | None = None) -> list[str]:
    """Pieces of at most `max_words`, whole sentences where they fit, none blank; joined, the text."""
    if count_words(text) <= max_words:
        return [text]
    pieces: list[str] = []
    piece, size = "", 0
    for sentence in split(text, language):
        words = count_words(sentence)
        if piece and size + words > max_words:
            pieces.append(piece)
            piece, size = "", 0
        if words > max_words:
            *full, sentence = cut(sentence, max_words)
            pieces += full
            words = count_words(sentence)
        piece, size = piece + sentence, size + words
    return [*pieces, piece]


def split(text: str, language: str | None = None) -> list[str]:
    """Sentences with the blanks after them; joined, exactly the text."""
    import sentencex

    code = language or languages.detect_start(text)
    found: list[str] = []
    start = 0
    while start < len(text):
        window = text[start : start + _WINDOW_CHARS]
        sentences: list[str] = sentencex.segment(code, window)
        if "".join(sentences) != window:
            sentences = [window]
        # The last sentence of a window may go on after it, so it is looked at again.
        if len(sentences) > 1 and start + len(window) < len(text):
            sentences = sentences[:-1]
        found += sentences
        start += sum(map(len, sentences))
    return _rejoin_windows(found)


def _rejoin_windows(sentences: list[str]) -> list[str]:
    """Join what was parted only because a window ended there."""
    joined: list[list[str]] = []
    open_ended = False
    for sentence in sentences:
        if open_ended:
            joined[-1].append(sentence)
        else:
            joined.append([sentence])
        open_ended = len(sentence) == _WINDOW_CHARS
    return ["".join(pieces) for pieces in joined]


def cut(text: str, max_words: int) -> list[str]:
    """Cut a long sentence into pieces of at most `max_words`, about equally long, where it hurts least."""
    starts = _cut_places(text)
    pieces: list[str] = []
    first, begin = 0, 0
    while len(starts) - first > max_words:
        left = len(starts) - first
        target = -(-left // -(-left // max_words))
        lowest = first + max(1, target // 2)
        at = max(range(lowest, first + max_words + 1), key=lambda i: (starts[i][1], -abs(i - first - target)))
        pieces.append(text[begin : starts[at][0]])
        first, begin = at, starts[at][0]
    return [*pieces, text[begin:]]


def split_in_two(text: str, max_words: int, min_words: int, language: str | None) -> tuple[str, str]:
    """Part a text of more than `max_words`, at a sentence's end if possible, with `min_words` each side."""
    places = _cut_places(text)
    ends: set[int] = set()
    at = 0
    for sentence in split(text, language):
        at += len(sentence)
        ends.add(at)
    lowest = max(min_words, len(places) - max_words, 1)
    highest = max(min(len(places) - min_words, max_words), lowest)
    best = max(
        range(lowest, min(highest, len(places) - 1) + 1),
        key=lambda i: (places[i][0] in ends, places[i][1], i),
    )
    place = places[best][0]
    return text[:place], text[place:]


def _cut_places(text: str) -> list[tuple[int, int]]:
    """For each unit of the budget: where a piece that starts with it would start, and how good a cut."""
    inside = _protected_offsets(text)
    places: list[tuple[int, int]] = []
    end = 0
    for match in languages.words(text):
        # Punctuation between two units belongs to the first, opening marks to the second.
        start = match.start()
        between = text[end:start]
        blank = re.search(r"\s\S*$", between[-40:])
        if blank:
            start -= len(blank[0]) - 1
        places.append((start, -1 if start in inside else _quality(text, start)))
        end = match.end()
    return places


def _quality(text: str, start: int) -> int:
    if start == 0:
        return _ANYWHERE
    before = text[max(start - 2, 0) : start]
    mark = before.rstrip()[-1:]
    spaced = before[-1:].isspace()
    if mark in ".!?;:。" and (spaced or not text[start : start + 1].isdigit()):
        return _STRONG
    if mark in ",、-" and (spaced or re.match(rf"[{languages.HAN_KANA}]", text[start : start + 1])):
        return _CLAUSE
    return _BLANK if spaced else _ANYWHERE


def _protected_offsets(text: str) -> set[int]:
    return {at for match in _PROTECTED.finditer(text) for at in range(match.start() + 1, match.end())}
