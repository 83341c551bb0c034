"""Splits a script into chunks, which are generated one after the other.

In: text, which is normalized here. Out: `Chunk`s. Invariants: no chunk is blank; the concatenated `text` of the chunks,
whitespace aside, is the normalized text; the time is linear. `word` and `speaker` split exactly where the reference
implementation does (`word` within each paragraph, as the reference intends). `sentence` and `auto` never cross a
boundary between speakers, stay within the word budget, and leave no chunk under `MIN_WORDS` next to one of the same
speaker.

`[pause:1.5s]` ends a chunk with every method, and becomes silence between chunks instead of text.

Does not depend on voices, tokens or durations.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from higgs_model.script import languages, sentences
from higgs_model.script.languages import count_words
from higgs_model.script.normalize import add_final_punctuation, split_paragraphs

ChunkMethod = Literal["auto", "sentence", "word", "speaker", "none"]
Boundary = Literal["sentence", "paragraph", "turn", "pause", "end"]

DEFAULT_MAX_WORDS_WORD = 200
"""The reference implementation's default for `word`."""
DEFAULT_MAX_WORDS_SENTENCE = 100
"""Default for `sentence` and `auto`: about forty seconds, over which the model keeps a consistent style."""
MIN_WORDS = 4
"""Shorter chunks are unstable: the model omits or adds words."""
MAX_PAUSE_MS = 600_000
_MAX_BUDGET_WORDS = 1000
"""More than fits into the model's context; budgets of `sentence` and `auto` are capped here."""

SPEAKER_TAG = re.compile(r"\[(SPEAKER\d+)\]")
_TURN_STARTS = ("[SPEAKER", "<|speaker_id_start|>")
_SPACES = r"[^\S\n]{0,40}"
_PAUSE = re.compile(
    rf"[\[【]{_SPACES}pause{_SPACES}[:：]{_SPACES}(\d{{1,9}}(?:\.\d{{1,9}})?){_SPACES}(ms|s){_SPACES}[\]】]",
    re.IGNORECASE,
)
"""Full-width brackets and colons too, because normalization would convert them."""
_PAUSE_ATTEMPT = re.compile(rf"[\[【]{_SPACES}pause{_SPACES}[:：][^\[\]【】\n]{{0,40}}[\]】]?", re.IGNORECASE)
_ONLY_TAGS = re.compile(rf"(?:\s*{SPEAKER_TAG.pattern})*\s*")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk, which becomes one user message.

    Attributes:
        index: position in the script, from 0.
        text: its part of the normalized text.
        speakers: tags (`SPEAKER0`) of the speakers in it, in order of appearance; empty for untagged text.
        resumes: the speaker whose tag is repeated before the text, because the chunk starts inside a turn.
        boundary: what ends it; larger boundaries get longer pauses.
        silence_before_ms: exact silence before the audio; only set on the first chunk.
        silence_after_ms: exact silence after the audio; 0 unless the script has a pause there.
    """

    index: int
    text: str
    speakers: tuple[str, ...] = ()
    resumes: str | None = None
    boundary: Boundary = "end"
    silence_before_ms: int = 0
    silence_after_ms: int = 0

    @property
    def prompt_text(self) -> str:
        """The content of the user message: the text, with the tag of a resumed turn."""
        return f"[{self.resumes}] {self.text}" if self.resumes else self.text


@dataclasses.dataclass(frozen=True)
class _Part:
    """Text between two pauses, as normalized paragraphs."""

    paragraphs: list[str]
    silence_before_ms: int
    speaker: str | None = None
    """The current speaker at its start."""

    @property
    def text(self) -> str:
        return "\n".join(self.paragraphs)


@dataclasses.dataclass(frozen=True)
class _Piece:
    text: str
    """While pieces are merged, it includes the whitespace before the next piece."""
    boundary: Boundary
    repeats_tag: bool = False
    """Whether a piece that starts inside a turn repeats its speaker's tag."""
    words: int = 0
    spoken_words: int = 0
    """Words without tags. Both are counted once, so that merging many short pieces stays linear."""

    @classmethod
    def with_counts(cls, text: str, boundary: Boundary) -> _Piece:
        spoken_words = count_words(SPEAKER_TAG.sub(" ", text))
        return cls(text, boundary, repeats_tag=True, words=count_words(text), spoken_words=spoken_words)


def chunk_text(
    text: str,
    method: ChunkMethod = "auto",
    max_words: int | None = None,
    max_turns: int = 1,
    language: str | None = None,
) -> list[Chunk]:
    """Split a script into chunks.

    Args:
        text: as the user wrote it.
        max_words: words per chunk; None: the method's default.
        max_turns: turns per chunk for `speaker` and `auto`.
        language: two-letter code for sentence boundaries; None: detected if needed.
    """
    parts, trailing_ms = _split_pauses(text)
    split = _select_splitter(method, parts, max_words, max_turns, language)
    chunks: list[Chunk] = []
    speaker: str | None = None
    for part in parts:
        before_ms = part.silence_before_ms
        if chunks and before_ms:
            chunks[-1] = dataclasses.replace(chunks[-1], silence_after_ms=before_ms, boundary="pause")
        for number, piece in enumerate(split(dataclasses.replace(part, speaker=speaker))):
            tags = list(dict.fromkeys(SPEAKER_TAG.findall(piece.text)))
            inside_turn = speaker is not None and not piece.text.startswith("[SPEAKER")
            names = [speaker, *tags] if inside_turn and speaker is not None else tags
            chunks.append(
                Chunk(
                    index=len(chunks),
                    text=piece.text,
                    speakers=tuple(dict.fromkeys(names)),
                    resumes=speaker if inside_turn and (piece.repeats_tag or number == 0) else None,
                    boundary=piece.boundary,
                    silence_before_ms=0 if chunks else before_ms,
                )
            )
            speaker = SPEAKER_TAG.findall(piece.text)[-1] if tags else speaker
    if chunks:
        chunks[-1] = dataclasses.replace(chunks[-1], boundary="end", silence_after_ms=trailing_ms)
    return chunks


def find_pause_errors(text: str) -> Iterator[str]:
    """Yield errors in the pauses of a text."""
    for match in _PAUSE_ATTEMPT.finditer(text):
        pause = _PAUSE.fullmatch(match[0])
        if pause is None:
            yield f"{match[0]!r} is not a pause; write for example [pause:1.5s] or [pause:300ms]"
        elif _parse_milliseconds(pause) > MAX_PAUSE_MS:
            yield f"{match[0]!r} is longer than {MAX_PAUSE_MS // 1000} s, the maximum"


def remove_pauses(text: str) -> str:
    """Replace each pause by a space."""
    return _PAUSE.sub(" ", text)


def split_turns(text: str) -> list[str]:
    """Split normalized text into turns with their tags: exactly the reference's `speaker` chunks."""
    turns: list[list[str]] = []
    for line in text.split("\n"):
        if not turns or line.startswith(_TURN_STARTS):
            turns.append([])
        turns[-1].append(line)
    return ["\n".join(lines) for lines in turns]


def is_only_tags(text: str) -> bool:
    """Return whether a text has speaker tags and nothing else."""
    return _ONLY_TAGS.fullmatch(text) is not None


def _parse_milliseconds(pause: re.Match[str]) -> int:
    return round(float(pause[1]) * (1000 if pause[2].lower() == "s" else 1))


def _split_pauses(text: str) -> tuple[list[_Part], int]:
    """Return the normalized parts between pauses, and the silence after the last. Consecutive pauses add up.

    A tag that is followed only by a pause belongs to the text after the pause or, at the end, to the text before.
    """
    pieces = _PAUSE.split(text)
    pauses = [_parse_milliseconds(match) for match in _PAUSE.finditer(text)]
    parts: list[_Part] = []
    silence_ms, pending = 0, ""
    for number, piece in enumerate(pieces[::3]):
        if number:
            silence_ms += pauses[number - 1]
        found = split_paragraphs(f"{pending} {piece}" if pending else piece)
        pending = ""
        text = " ".join(found)
        is_tags_only = SPEAKER_TAG.search(text) is not None and not _has_words(text)
        if is_tags_only and number < len(pauses):
            pending = text
        elif is_tags_only and parts:
            parts[-1].paragraphs[-1] += f" {text}"
        elif found:
            parts.append(_Part(found, silence_ms))
            silence_ms = 0
    if parts:
        parts[-1].paragraphs[-1] = add_final_punctuation(parts[-1].paragraphs[-1])
    return parts, silence_ms


_Splitter = Callable[[_Part], Iterable[_Piece]]


def _select_splitter(
    method: ChunkMethod, parts: list[_Part], max_words: int | None, max_turns: int, language: str | None
) -> _Splitter:
    budget = _Budget.from_max_words(max_words)
    if method == "auto":
        if any(SPEAKER_TAG.search(part.text) for part in parts):
            return functools.partial(_split_by_turn, budget=budget, turns=max_turns, language=language)
        num_words = sum(count_words(part.text) for part in parts)
        method = "none" if num_words <= budget.max_words else "sentence"
    if method == "none":
        return lambda part: [_Piece(part.text, "end")]
    if method == "speaker":
        return functools.partial(_split_by_speaker, turns=max_turns)
    if method == "word":
        # The reference detects the language of the whole text once, whatever its paragraphs are.
        is_chinese = languages.detect_language(add_final_punctuation("\n".join(part.text for part in parts))) == "zh"
        limit = DEFAULT_MAX_WORDS_WORD if max_words is None else max_words
        return functools.partial(_split_by_word, max_words=limit, is_chinese=is_chinese)
    return functools.partial(_split_by_sentence, budget=budget, language=language)


def _split_by_speaker(part: _Part, turns: int) -> list[_Piece]:
    found = split_turns(part.text)
    return [_Piece("\n".join(found[start : start + turns]), "turn") for start in range(0, len(found), turns)]


def _split_by_word(part: _Part, max_words: int, is_chinese: bool) -> list[_Piece]:
    """Split by words; the last chunk of a paragraph ends with an empty line, as in the reference."""
    pieces: list[_Piece] = []
    for paragraph in part.paragraphs:
        words = _split_chinese_words(paragraph) if is_chinese else paragraph.split(" ")
        separator = "" if is_chinese else " "
        texts: list[str] = []
        for start in range(0, len(words), max_words):
            text = separator.join(words[start : start + max_words])
            if text.isspace() and texts:
                texts[-1] += text
            else:
                texts.append(text)
        pieces += [_Piece(text, "sentence") for text in texts[:-1]]
        pieces.append(_Piece(texts[-1] + "\n\n", "paragraph"))
    return pieces


@functools.lru_cache(maxsize=1)
def _load_chinese_segmenter() -> Callable[[str], Iterator[str]]:
    import jieba

    tokenizer = jieba.Tokenizer()
    # jieba's own initialization would unmarshal a cache file from the shared temporary folder.
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    segment: Callable[[str], Iterator[str]] = tokenizer.cut
    return segment


def _split_chinese_words(text: str) -> list[str]:
    return list(_load_chinese_segmenter()(text))


@dataclasses.dataclass(frozen=True)
class _Budget:
    max_words: int
    min_words: int

    @classmethod
    def from_max_words(cls, max_words: int | None) -> _Budget:
        limit = min(DEFAULT_MAX_WORDS_SENTENCE if max_words is None else max_words, _MAX_BUDGET_WORDS)
        return cls(max_words=limit, min_words=min(MIN_WORDS, max(1, limit // 2)))


def _split_by_turn(part: _Part, budget: _Budget, turns: int, language: str | None) -> list[_Piece]:
    """Keep turns that fit into the budget, and split the others by sentences."""
    found = _split_at_tags(part.text)
    pieces: list[_Piece] = []
    for start in range(0, len(found), turns):
        group = found[start : start + turns]
        text = "\n".join(group)
        piece = _Piece.with_counts(text + "\n", "turn")
        if piece.words <= budget.max_words:
            pieces.append(piece)
            continue
        for turn in group:
            pieces += _split_turn(turn, budget, language, "turn")
    return _merge_short(pieces, budget, language, part.speaker)


def _split_by_sentence(part: _Part, budget: _Budget, language: str | None) -> list[_Piece]:
    pieces: list[_Piece] = []
    for paragraph in part.paragraphs:
        *turns, last = _split_at_tags(paragraph)
        for turn in turns:
            pieces += _split_turn(turn, budget, language, "turn")
        pieces += _split_turn(last, budget, language, "paragraph")
    return _merge_short(pieces, budget, language, part.speaker)


def _split_at_tags(text: str) -> list[str]:
    """Split like `split_turns`, but tags inside a line start turns too; a lone tag joins the following text."""
    starts = [match.start() for match in SPEAKER_TAG.finditer(text)]
    edges = sorted({0, *starts, len(text)})
    turns: list[str] = []
    pending: list[str] = []
    for start, end in zip(edges, edges[1:], strict=False):
        turn = text[start:end].strip()
        if turn:
            pending.append(turn)
        if not is_only_tags(turn):
            turns.append(" ".join(pending))
            pending = []
    return [*turns, " ".join(pending)] if pending else turns


def _split_turn(text: str, budget: _Budget, language: str | None, last_boundary: Boundary) -> list[_Piece]:
    *pieces, tail = sentences.pack_sentences(text, budget.max_words, language)
    complete = [_Piece.with_counts(piece, "sentence") for piece in pieces]
    return [*complete, _Piece.with_counts(tail + "\n", last_boundary)]


def _merge_short(pieces: list[_Piece], budget: _Budget, language: str | None, speaker: str | None) -> list[_Piece]:
    """Merge pieces that are too short with a neighbour of the same speaker.

    If the two together exceed the budget, they are split again at a better place.
    """
    merged: list[_Piece] = []
    before = speaker
    for piece in _merge_tag_only(pieces):
        speaker = _sole_speaker(piece.text, before)
        if merged and speaker == before != "" and min(merged[-1].spoken_words, piece.spoken_words) < budget.min_words:
            merged[-1:] = _merge(merged[-1], piece, budget, language)
        else:
            merged.append(piece)
        before = speaker
    return [dataclasses.replace(piece, text=piece.text.strip()) for piece in merged]


def _merge_tag_only(pieces: list[_Piece]) -> list[_Piece]:
    """Merge pieces that contain only tags with the following piece or, at the end, the preceding one."""
    merged: list[_Piece] = []
    pending: list[str] = []
    for piece in pieces:
        pending.append(piece.text)
        if SPEAKER_TAG.search(piece.text) is None and len(pending) == 1:
            merged.append(piece)
            pending = []
        elif _has_words(piece.text):
            merged.append(piece if len(pending) == 1 else _Piece.with_counts("".join(pending), piece.boundary))
            pending = []
    if pending:
        backwards = ["".join(pending)]
        while merged:
            before = merged.pop().text
            backwards.append(before.rstrip() + " ")
            if _has_words(before):
                break
        merged.append(_Piece.with_counts("".join(reversed(backwards)), pieces[-1].boundary))
    return merged


def _has_words(text: str) -> bool:
    """Return whether a text has more than tags and punctuation."""
    return re.search(r"\w", SPEAKER_TAG.sub("", text)) is not None


def _sole_speaker(text: str, before: str | None) -> str | None:
    """Return the only speaker of a piece; None if there was no tag so far, "" for several speakers."""
    tags = set(SPEAKER_TAG.findall(text))
    if not text.startswith("[SPEAKER"):
        tags |= {before} if before is not None else set()
    return tags.pop() if len(tags) == 1 else ("" if tags else None)


def _merge(first: _Piece, second: _Piece, budget: _Budget, language: str | None) -> list[_Piece]:
    text = first.text + second.text
    words = first.words + second.words
    spoken_words = first.spoken_words + second.spoken_words
    if words <= budget.max_words:
        return [_Piece(text, second.boundary, repeats_tag=True, words=words, spoken_words=spoken_words)]
    # Tags count towards the budget without being spoken, so pieces with tags need more words.
    tags = len(SPEAKER_TAG.findall(text))
    min_words = max(budget.min_words, min(budget.min_words + tags, budget.max_words // 2))
    head, tail = sentences.split_in_two(text, budget.max_words, min_words, language)
    return [_Piece.with_counts(head, "sentence"), _Piece.with_counts(tail, second.boundary)]
