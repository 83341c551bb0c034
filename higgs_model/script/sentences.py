"""Packs sentences up to a word budget, and splits sentences that exceed it at the best place.

In: text. Out: consecutive pieces whose concatenation is the text. Sentence boundaries come from Wikimedia's sentencex,
which supports some 300 languages; it runs on windows of the text, because its time is not linear. Does not depend
on speakers or paragraphs.
"""

from __future__ import annotations

import re

from higgs_model.script import languages
from higgs_model.script.languages import count_words

_WINDOW_CHARS = 2000
_PROTECTED = re.compile(r"<SE(?:_[se])?>[^<]{0,80}</SE(?:_[se])?>|\[[^\[\]\n]{0,80}\]")
"""Sound and speaker tags, which are never split."""

_SENTENCE, _CLAUSE, _SPACE, _ANYWHERE = 3, 2, 1, 0


def pack_sentences(text: str, max_words: int, language: str | None = None) -> list[str]:
    """Return non-blank pieces of at most `max_words`, of complete sentences if possible."""
    if count_words(text) <= max_words:
        return [text]
    pieces: list[str] = []
    piece, size = "", 0
    for sentence in split_sentences(text, language):
        words = count_words(sentence)
        if piece and size + words > max_words:
            pieces.append(piece)
            piece, size = "", 0
        if words > max_words:
            *full, sentence = split_long_sentence(sentence, max_words)
            pieces += full
            words = count_words(sentence)
        piece, size = piece + sentence, size + words
    return [*pieces, piece]


def split_sentences(text: str, language: str | None = None) -> list[str]:
    """Split a text into sentences with the whitespace after them; concatenated, they are exactly the text."""
    import sentencex

    code = language or languages.detect_language_from_start(text)
    result: list[str] = []
    start = 0
    while start < len(text):
        window = text[start : start + _WINDOW_CHARS]
        sentences: list[str] = sentencex.segment(code, window)
        if "".join(sentences) != window:
            sentences = [window]
        # The last sentence of a window may continue after it, so it starts the next window.
        if len(sentences) > 1 and start + len(window) < len(text):
            sentences = sentences[:-1]
        result += sentences
        start += sum(map(len, sentences))
    return _rejoin_windows(result)


def _rejoin_windows(sentences: list[str]) -> list[str]:
    """Join sentences that were split only because a window ended."""
    joined: list[list[str]] = []
    open_ended = False
    for sentence in sentences:
        if open_ended:
            joined[-1].append(sentence)
        else:
            joined.append([sentence])
        open_ended = len(sentence) == _WINDOW_CHARS
    return ["".join(pieces) for pieces in joined]


def split_long_sentence(text: str, max_words: int) -> list[str]:
    """Split a long sentence at the best points into pieces of at most `max_words` and similar length."""
    starts = _list_split_points(text)
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
    """Split a text of more than `max_words` in two, at a sentence end if possible, with `min_words` on each side."""
    points = _list_split_points(text)
    ends: set[int] = set()
    at = 0
    for sentence in split_sentences(text, language):
        at += len(sentence)
        ends.add(at)
    lowest = max(min_words, len(points) - max_words, 1)
    highest = max(min(len(points) - min_words, max_words), lowest)
    best = max(
        range(lowest, min(highest, len(points) - 1) + 1),
        key=lambda i: (points[i][0] in ends, points[i][1], i),
    )
    point = points[best][0]
    return text[:point], text[point:]


def _list_split_points(text: str) -> list[tuple[int, int]]:
    """Return, for each word, the offset at which a piece starting with it begins, and how good that split is."""
    protected = _find_protected_offsets(text)
    points: list[tuple[int, int]] = []
    end = 0
    for match in languages.iter_words(text):
        # Punctuation between two words belongs to the first, opening marks to the second.
        start = match.start()
        between = text[end:start]
        blank = re.search(r"\s\S*$", between[-40:])
        if blank:
            start -= len(blank[0]) - 1
        points.append((start, -1 if start in protected else _rate_split(text, start)))
        end = match.end()
    return points


def _rate_split(text: str, start: int) -> int:
    if start == 0:
        return _ANYWHERE
    before = text[max(start - 2, 0) : start]
    mark = before.rstrip()[-1:]
    spaced = before[-1:].isspace()
    if mark in ".!?;:。" and (spaced or not text[start : start + 1].isdigit()):
        return _SENTENCE
    if mark in ",、-" and (spaced or re.match(rf"[{languages.HAN_KANA}]", text[start : start + 1])):
        return _CLAUSE
    return _SPACE if spaced else _ANYWHERE


def _find_protected_offsets(text: str) -> set[int]:
    return {offset for match in _PROTECTED.finditer(text) for offset in range(match.start() + 1, match.end())}
