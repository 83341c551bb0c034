"""Pieces of a script that the model speaks one after the other: normalised text in, `Chunk`s out.

Invariants: no chunk is blank; the chunks' `text`, blanks aside, is the normalised text, in order, nothing
    lost or doubled; the time is linear in the text. `word` and `speaker` cut exactly where the reference
    implementation does (`word` within each paragraph, which the reference means to do). `sentence` and `auto`
    never pass a boundary between speakers, keep within the word budget, and leave no chunk under `MIN_WORDS`
    beside one of the same speaker.

`[pause:1.5s]` ends a chunk under every method, and is silence between chunks instead of text.

Knows nothing of voices, tokens, or how long anything takes.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from higgs_model.script import languages, sentences
from higgs_model.script.languages import count_words
from higgs_model.script.normalize import finish, paragraphs

ChunkMethod = Literal["auto", "sentence", "word", "speaker", "none"]
Boundary = Literal["sentence", "paragraph", "turn", "pause", "end"]

WORDS_PER_WORD_CHUNK = 200
"""The reference's default for `word`."""
WORDS_PER_SENTENCE_CHUNK = 100
"""Default for `sentence` and `auto`: some forty seconds, within which the model keeps its manner."""
MIN_WORDS = 4
"""Shorter pieces are unstable: the model swallows them or adds to them."""
MAX_PAUSE_MS = 600_000
_MOST_WORDS = 1000
"""More than the model's whole length can hold; a greater budget for `sentence` and `auto` means this."""

SPEAKER_TAG = re.compile(r"\[(SPEAKER\d+)\]")
_TURN_STARTS = ("[SPEAKER", "<|speaker_id_start|>")
_GAP = r"[^\S\n]{0,40}"
_PAUSE = re.compile(
    rf"[\[【]{_GAP}pause{_GAP}[:：]{_GAP}(\d{{1,9}}(?:\.\d{{1,9}})?){_GAP}(ms|s){_GAP}[\]】]", re.IGNORECASE
)
"""Full-width marks too, since normalisation would make the others of them."""
_PAUSE_LIKE = re.compile(rf"[\[【]{_GAP}pause{_GAP}[:：][^\[\]【】\n]{{0,40}}[\]】]?", re.IGNORECASE)
_ONLY_TAGS = re.compile(rf"(?:\s*{SPEAKER_TAG.pattern})*\s*")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One user message.

    Attributes:
        index: place in the script, from 0.
        text: its piece of the normalised text.
        speakers: whose turns it holds, as tags (`SPEAKER0`), in order of appearance; empty for untagged text.
        resumes: the speaker to be named again in front of the text, because the text goes on inside a turn.
        boundary: what ends it; longer pauses belong after greater boundaries.
        silence_before_ms: exact silence before the audio; only ever set on the first chunk.
        silence_after_ms: exact silence after the audio, 0 where the script asks for none.
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
        """What the user message says."""
        return f"[{self.resumes}] {self.text}" if self.resumes else self.text


@dataclasses.dataclass(frozen=True)
class _Part:
    """Text between two pauses, as normalised paragraphs."""

    paragraphs: list[str]
    silence_before_ms: int
    speaker: str | None = None
    """Who goes on speaking in it, until a tag says otherwise."""

    @property
    def text(self) -> str:
        return "\n".join(self.paragraphs)


@dataclasses.dataclass(frozen=True)
class _Piece:
    text: str
    """While pieces are still being merged, with the blanks that part it from the next."""
    boundary: Boundary
    renames: bool = False
    """Whether a piece that starts inside a turn names its speaker again."""
    words: int = 0
    said: int = 0
    """Its words without the tags; both counted once, so that merging many short pieces stays linear."""

    @classmethod
    def counted(cls, text: str, boundary: Boundary) -> _Piece:
        said = count_words(SPEAKER_TAG.sub(" ", text))
        return cls(text, boundary, renames=True, words=count_words(text), said=said)


def chunk_text(
    text: str,
    method: ChunkMethod = "auto",
    max_words: int | None = None,
    max_turns: int = 1,
    language: str | None = None,
) -> list[Chunk]:
    """Cut a script.

    Args:
        text: as the user wrote it; it is normalised here.
        max_words: None is the method's default.
        max_turns: turns a chunk for `speaker` and `auto`.
        language: two-letter code for sentence boundaries; None detects it where needed.
    """
    parts, trailing_ms = _split_pauses(text)
    cut = _cutter(method, parts, max_words, max_turns, language)
    chunks: list[Chunk] = []
    speaker: str | None = None
    for part in parts:
        before_ms = part.silence_before_ms
        if chunks and before_ms:
            chunks[-1] = dataclasses.replace(chunks[-1], silence_after_ms=before_ms, boundary="pause")
        for number, piece in enumerate(cut(dataclasses.replace(part, speaker=speaker))):
            tags = list(dict.fromkeys(SPEAKER_TAG.findall(piece.text)))
            inside_turn = speaker is not None and not piece.text.startswith("[SPEAKER")
            names = [speaker, *tags] if inside_turn and speaker is not None else tags
            chunks.append(
                Chunk(
                    index=len(chunks),
                    text=piece.text,
                    speakers=tuple(dict.fromkeys(names)),
                    resumes=speaker if inside_turn and (piece.renames or number == 0) else None,
                    boundary=piece.boundary,
                    silence_before_ms=0 if chunks else before_ms,
                )
            )
            speaker = SPEAKER_TAG.findall(piece.text)[-1] if tags else speaker
    if chunks:
        chunks[-1] = dataclasses.replace(chunks[-1], boundary="end", silence_after_ms=trailing_ms)
    return chunks


def pause_faults(text: str) -> Iterator[str]:
    """What is wrong with the pauses of a text, in words."""
    for match in _PAUSE_LIKE.finditer(text):
        pause = _PAUSE.fullmatch(match[0])
        if pause is None:
            yield f"{match[0]!r} is no pause; write for example [pause:1.5s] or [pause:300ms]"
        elif _milliseconds(pause) > MAX_PAUSE_MS:
            yield f"{match[0]!r} is longer than {MAX_PAUSE_MS // 1000} s, the longest pause there is"


def without_pauses(text: str) -> str:
    """The text with a blank in place of each pause."""
    return _PAUSE.sub(" ", text)


def spoken_turns(text: str) -> list[str]:
    """The turns of normalised text, each with its tag: exactly the reference's `speaker` chunks."""
    turns: list[list[str]] = []
    for line in text.split("\n"):
        if not turns or line.startswith(_TURN_STARTS):
            turns.append([])
        turns[-1].append(line)
    return ["\n".join(lines) for lines in turns]


def is_only_tags(text: str) -> bool:
    """Whether a piece names speakers and then says nothing."""
    return _ONLY_TAGS.fullmatch(text) is not None


def _milliseconds(pause: re.Match[str]) -> int:
    return round(float(pause[1]) * (1000 if pause[2].lower() == "s" else 1))


def _split_pauses(text: str) -> tuple[list[_Part], int]:
    """The normalised parts between pauses, and the silence after the last. Pauses in a row add up.

    A tag with nothing but a pause after it belongs to what follows the pause, or, at the end, to what came before.
    """
    pieces = _PAUSE.split(text)
    pauses = [_milliseconds(match) for match in _PAUSE.finditer(text)]
    parts: list[_Part] = []
    silence_ms, carried = 0, ""
    for number, piece in enumerate(pieces[::3]):
        if number:
            silence_ms += pauses[number - 1]
        found = paragraphs(f"{carried} {piece}" if carried else piece)
        carried = ""
        text = " ".join(found)
        names_only = SPEAKER_TAG.search(text) is not None and not _has_words(text)
        if names_only and number < len(pauses):
            carried = text
        elif names_only and parts:
            parts[-1].paragraphs[-1] += f" {text}"
        elif found:
            parts.append(_Part(found, silence_ms))
            silence_ms = 0
    if parts:
        parts[-1].paragraphs[-1] = finish(parts[-1].paragraphs[-1])
    return parts, silence_ms


_Cut = Callable[[_Part], Iterable[_Piece]]


def _cutter(
    method: ChunkMethod, parts: list[_Part], max_words: int | None, max_turns: int, language: str | None
) -> _Cut:
    if method == "auto":
        if any(SPEAKER_TAG.search(part.text) for part in parts):
            return functools.partial(_cut_turns, budget=_Budget.of(max_words), turns=max_turns, language=language)
        if sum(count_words(part.text) for part in parts) <= _Budget.of(max_words).max_words:
            method = "none"
        else:
            method = "sentence"
    if method == "none":
        return lambda part: [_Piece(part.text, "end")]
    if method == "speaker":
        return functools.partial(_cut_speaker, turns=max_turns)
    if method == "word":
        # The reference judges the whole text once; a paragraph of another language does not change the way.
        by_meaning = languages.detect(finish("\n".join(part.text for part in parts))) == "zh"
        limit = WORDS_PER_WORD_CHUNK if max_words is None else max_words
        return functools.partial(_cut_word, max_words=limit, by_meaning=by_meaning)
    return functools.partial(_cut_sentences, budget=_Budget.of(max_words), language=language)


def _cut_speaker(part: _Part, turns: int) -> list[_Piece]:
    found = spoken_turns(part.text)
    return [_Piece("\n".join(found[at : at + turns]), "turn") for at in range(0, len(found), turns)]


def _cut_word(part: _Part, max_words: int, by_meaning: bool) -> list[_Piece]:
    """The last chunk of a paragraph ends in an empty line, as in the reference."""
    pieces: list[_Piece] = []
    for paragraph in part.paragraphs:
        found = _chinese_words(paragraph) if by_meaning else paragraph.split(" ")
        glue = "" if by_meaning else " "
        texts: list[str] = []
        for at in range(0, len(found), max_words):
            text = glue.join(found[at : at + max_words])
            if text.isspace() and texts:
                texts[-1] += text
            else:
                texts.append(text)
        pieces += [_Piece(text, "sentence") for text in texts[:-1]]
        pieces.append(_Piece(texts[-1] + "\n\n", "paragraph"))
    return pieces


@functools.lru_cache(maxsize=1)
def _segmenter() -> Callable[[str], Iterator[str]]:
    import jieba

    tokenizer = jieba.Tokenizer()
    # Its own set-up would read a marshalled cache from the machine's common temporary folder.
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    cut: Callable[[str], Iterator[str]] = tokenizer.cut
    return cut


def _chinese_words(text: str) -> list[str]:
    return list(_segmenter()(text))


@dataclasses.dataclass(frozen=True)
class _Budget:
    max_words: int
    min_words: int

    @classmethod
    def of(cls, max_words: int | None) -> _Budget:
        limit = min(WORDS_PER_SENTENCE_CHUNK if max_words is None else max_words, _MOST_WORDS)
        return cls(max_words=limit, min_words=min(MIN_WORDS, max(1, limit // 2)))


def _cut_turns(part: _Part, budget: _Budget, turns: int, language: str | None) -> list[_Piece]:
    """Turns as they are where they fit; those that do not, by sentences."""
    found = _tagged_turns(part.text)
    pieces: list[_Piece] = []
    for at in range(0, len(found), turns):
        group = found[at : at + turns]
        text = "\n".join(group)
        whole = _Piece.counted(text + "\n", "turn")
        if whole.words <= budget.max_words:
            pieces.append(whole)
            continue
        for turn in group:
            pieces += _sentence_pieces(turn, budget, language, "turn")
    return _join_short(pieces, budget, language, part.speaker)


def _cut_sentences(part: _Part, budget: _Budget, language: str | None) -> list[_Piece]:
    pieces: list[_Piece] = []
    for paragraph in part.paragraphs:
        *turns, last = _tagged_turns(paragraph)
        for turn in turns:
            pieces += _sentence_pieces(turn, budget, language, "turn")
        pieces += _sentence_pieces(last, budget, language, "paragraph")
    return _join_short(pieces, budget, language, part.speaker)


def _tagged_turns(text: str) -> list[str]:
    """Like `spoken_turns`, but a tag inside a line starts a turn too; a tag alone goes with what follows."""
    starts = [match.start() for match in SPEAKER_TAG.finditer(text)]
    edges = sorted({0, *starts, len(text)})
    turns: list[str] = []
    bare: list[str] = []
    for start, end in zip(edges, edges[1:], strict=False):
        turn = text[start:end].strip()
        if turn:
            bare.append(turn)
        if not is_only_tags(turn):
            turns.append(" ".join(bare))
            bare = []
    return [*turns, " ".join(bare)] if bare else turns


def _sentence_pieces(text: str, budget: _Budget, language: str | None, last: Boundary) -> list[_Piece]:
    *pieces, tail = sentences.pack(text, budget.max_words, language)
    whole = [_Piece.counted(piece, "sentence") for piece in pieces]
    return [*whole, _Piece.counted(tail + "\n", last)]


def _join_short(pieces: list[_Piece], budget: _Budget, language: str | None, speaker: str | None) -> list[_Piece]:
    """Merge pieces that are too short into the piece before, or after, of the same speaker.

    Where the two together pass the budget, they are cut anew, further from the end.
    """
    done: list[_Piece] = []
    before = speaker
    for piece in _with_words(pieces):
        speaker = _only_speaker(piece.text, before)
        if done and speaker == before != "" and min(done[-1].said, piece.said) < budget.min_words:
            done[-1:] = _merge(done[-1], piece, budget, language)
        else:
            done.append(piece)
        before = speaker
    return [dataclasses.replace(piece, text=piece.text.strip()) for piece in done]


def _with_words(pieces: list[_Piece]) -> list[_Piece]:
    """Pieces that only name speakers go with what follows, or, at the end, with what came before."""
    found: list[_Piece] = []
    bare: list[str] = []
    for piece in pieces:
        bare.append(piece.text)
        if SPEAKER_TAG.search(piece.text) is None and len(bare) == 1:
            found.append(piece)
            bare = []
        elif _has_words(piece.text):
            found.append(piece if len(bare) == 1 else _Piece.counted("".join(bare), piece.boundary))
            bare = []
    if bare:
        last = ["".join(bare)]
        while found:
            before = found.pop().text
            last.append(before.rstrip() + " ")
            if _has_words(before):
                break
        found.append(_Piece.counted("".join(reversed(last)), pieces[-1].boundary))
    return found


def _has_words(text: str) -> bool:
    """Whether there is anything to say in it besides tags and punctuation."""
    return re.search(r"\w", SPEAKER_TAG.sub("", text)) is not None


def _only_speaker(text: str, before: str | None) -> str | None:
    """Who speaks the whole piece; None while nobody was named, "" when there are several."""
    tags = set(SPEAKER_TAG.findall(text))
    if not text.startswith("[SPEAKER"):
        tags |= {before} if before is not None else set()
    return tags.pop() if len(tags) == 1 else ("" if tags else None)


def _merge(first: _Piece, second: _Piece, budget: _Budget, language: str | None) -> list[_Piece]:
    text = first.text + second.text
    words, said = first.words + second.words, first.said + second.said
    if words <= budget.max_words:
        return [_Piece(text, second.boundary, renames=True, words=words, said=said)]
    # Tags take room and say nothing, so where there are some, a piece needs more to be long enough.
    tags = len(SPEAKER_TAG.findall(text))
    min_words = max(budget.min_words, min(budget.min_words + tags, budget.max_words // 2))
    head, tail = sentences.split_in_two(text, budget.max_words, min_words, language)
    return [_Piece.counted(head, "sentence"), _Piece.counted(tail, second.boundary)]
