"""Chunking: no text is lost or duplicated, no chunk is blank or over budget, and the time is linear."""

import itertools
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from higgs_model.script import chunking, languages, sentences
from higgs_model.script.chunking import SPEAKER_TAG, chunk_text
from higgs_model.script.languages import count_words
from higgs_model.script.normalize import add_final_punctuation, normalize, split_paragraphs

METHODS = ("auto", "sentence", "word", "speaker", "none")
PIECES = st.sampled_from(
    [
        "Hello there. ",
        "No",
        "yes, I do; ",
        "\n",
        "\n\n",
        "[SPEAKER0] ",
        "[SPEAKER1] ",
        "你好，世界。",
        "[pause:1.5s]",
        "(x) ",
    ]
    + [
        "[laugh]",
        "Dr. Who? ",
        '"Quite." ',
        "한국어 ",
        "สวัสดี",
        "…",
        " - ",
        "word " * 12,
        "<SE>[Music]</SE>",
        "3.14 ",
    ]
)
TEXTS = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=30).map("".join)).filter(
    lambda text: not any("\ud800" <= character <= "\udfff" for character in text)
)


def _remove_whitespace(text):
    return "".join(text.split())


@given(text=TEXTS, method=st.sampled_from(METHODS), max_words=st.integers(1, 40), max_turns=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_chunks_concatenate_to_the_normalized_text(text, method, max_words, max_turns):
    chunks = chunk_text(text, method, max_words, max_turns)
    assert all(chunk.text.strip() for chunk in chunks)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    plain = chunking.remove_pauses(text)
    if chunks:
        assert _remove_whitespace("".join(chunk.text for chunk in chunks)) == _remove_whitespace(normalize(plain))
    else:
        assert not split_paragraphs(plain)
    if method in ("auto", "sentence"):
        assert all(count_words(chunk.text) <= max(max_words, 1) for chunk in chunks if _has_no_tag(chunk.text))


def _has_no_tag(text):
    """Tags may exceed a budget, because they are never separated from each other or from the next word."""
    return not SPEAKER_TAG.search(text)


@example(text="[SPEAKER0] Hello there. yes, I do; " + "word " * 24)
@given(text=st.lists(PIECES, min_size=1, max_size=30).map("".join))
@settings(max_examples=150, deadline=None)
def test_no_short_chunk_is_next_to_one_of_the_same_speaker(text):
    # Every tag needs text, because a tag without any is not a turn.
    text = SPEAKER_TAG.sub(r"\g<0> Well,", text)
    chunks = chunk_text(text, "sentence", 30)
    for first, second in zip(chunks, chunks[1:], strict=False):
        separate = first.boundary == "pause" or first.speakers != second.speakers or len(first.speakers) > 1
        spoken_words = [count_words(SPEAKER_TAG.sub(" ", chunk.text)) for chunk in (first, second)]
        assert separate or min(spoken_words) >= chunking.MIN_WORDS


def test_normalize_joins_paragraphs():
    text = "One line\n here.\n\n\n(Second)  paragraph\n \nThird"
    assert split_paragraphs(text) == ["One line\nhere.", "Second paragraph", "Third"]
    assert normalize(text) == add_final_punctuation("\n".join(split_paragraphs(text)))


def test_auto_selects_method_by_turns_and_length():
    assert [chunk.text for chunk in chunk_text("Short.\n\nText")] == ["Short.\nText."]
    assert len(chunk_text("A sentence of six words here. " * 40)) == 3
    turns = chunk_text("[SPEAKER0] Hello there, my friend.\n[SPEAKER1] Hi, how are you?")
    assert [chunk.speakers for chunk in turns] == [("SPEAKER0",), ("SPEAKER1",)]


def test_long_turn_repeats_its_speaker_tag():
    chunks = chunk_text("[SPEAKER1] " + "This goes on and on. " * 30)
    assert len(chunks) == 2
    assert chunks[1].speakers == ("SPEAKER1",)
    assert chunks[1].prompt_text == f"[SPEAKER1] {chunks[1].text}"


def test_tag_inside_a_line_starts_a_turn():
    chunks = chunk_text("[SPEAKER0] Well, hello to you. [SPEAKER1] And hello to you too.", "sentence")
    assert [chunk.speakers for chunk in chunks] == [("SPEAKER0",), ("SPEAKER1",)]


@pytest.mark.parametrize("method", METHODS)
def test_pauses_become_silence_instead_of_text(method):
    chunks = chunk_text(
        "[pause:1s]One two three four. [pause: 250ms][pause:1.5s] Five six seven eight [PAUSE:2 s]", method
    )
    assert [chunk.text.strip() for chunk in chunks] == ["One two three four.", "Five six seven eight."]
    assert [chunk.silence_before_ms for chunk in chunks] == [1000, 0]
    assert [chunk.silence_after_ms for chunk in chunks] == [1750, 2000]


def test_tag_before_a_pause_belongs_to_the_following_text():
    chunks = chunk_text("[SPEAKER0] [pause:1s] Hello to you.", "speaker")
    assert [(chunk.text, chunk.silence_before_ms) for chunk in chunks] == [("[SPEAKER0] Hello to you.", 1000)]


@pytest.mark.parametrize("method", ["auto", "sentence"])
@pytest.mark.parametrize(
    "text",
    [
        "Hello to you all. [SPEAKER0]",
        "[SPEAKER0] Hello to you all. [SPEAKER1]",
        "[SPEAKER0]\n\nHello to you all.",
        "Hello to you all.\n\n[SPEAKER1]\n\nAnd to you too, my friends.",
        "Hello to you all. [pause:1s] [SPEAKER0]",
        "[SPEAKER1] [SPEAKER0] Hello to you all.",
        "Hello to you all. [SPEAKER0] …",
        "[SPEAKER0] Hello to you all.\n[SPEAKER1]\n[SPEAKER0] And to you too, my friends.\n[SPEAKER1]",
    ],
)
@pytest.mark.parametrize("max_words", [None, 4])
def test_no_chunk_consists_of_tags_only(text, method, max_words):
    chunks = chunk_text(text, method, max_words)
    assert all(_has_words(chunk.text) for chunk in chunks)
    assert _remove_whitespace("".join(chunk.text for chunk in chunks)) == _remove_whitespace(
        normalize(chunking.remove_pauses(text))
    )


@given(text=st.lists(PIECES, min_size=1, max_size=30).map("".join), max_words=st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_every_chunk_has_words(text, max_words):
    if not _has_words(chunking.remove_pauses(text)):
        return
    for method in ("auto", "sentence"):
        for chunk in chunk_text(text, method, max_words):
            assert _has_words(chunk.text) or not SPEAKER_TAG.search(chunk.text)


def _has_words(text):
    return re.search(r"\w", SPEAKER_TAG.sub("", text)) is not None


def test_long_sentences_are_split_at_clauses_but_not_in_tags():
    text = "one two three four five six, seven eight nine ten eleven <SE>[Laughter]</SE> twelve thirteen"
    assert chunk_text(text, "sentence", 8)[0].text == "one two three four five six,"
    assert all(chunk.text.count("<SE>") == chunk.text.count("</SE>") for chunk in chunk_text(text, "sentence", 5))


def test_chinese_budget_counts_characters():
    chunks = chunk_text("我们今天去公园玩。" * 20, "sentence", 20)
    assert all(count_words(chunk.text) <= 20 for chunk in chunks)
    assert all(chunk.text.endswith(".") for chunk in chunks)


@pytest.mark.parametrize(
    "unit",
    [
        "Hello, brave new world. ",
        "a",
        '"a ',
        "Hi.\n\n",
        "你好。",
        "[SPEAKER0] Yes.\n",
        "a [pause:1s] ",
        "No! ",
        "[SPEAKER1] ",
    ],
)
@pytest.mark.parametrize("method", ["auto", "sentence"])
def test_chunking_takes_linear_time(unit, method, monkeypatch):
    """Counting words and segmenting sentences stays linear, however many pieces are merged."""
    import sentencex

    chars_read = 0

    class CountingPattern:
        def __init__(self, pattern):
            self.finditer = lambda text: tally(text) or pattern.finditer(text)

    def tally(text):
        nonlocal chars_read
        chars_read += len(text)

    segment = sentencex.segment
    monkeypatch.setattr(languages, "_WORD", CountingPattern(languages._WORD))
    monkeypatch.setattr(sentencex, "segment", lambda code, text: tally(text) or segment(code, text))
    text = (unit * 20_000)[:20_000] + "end"
    assert chunk_text(text, method, 30, language="en")
    assert chars_read < 15 * len(text)


@given(
    texts=st.lists(st.sampled_from(["Is it? ", "Yes. ", "It costs 3.5 or so. ", "word " * 9, "x" * 50]), min_size=1),
    window=st.integers(8, 60),
)
@settings(max_examples=100, deadline=None)
def test_windows_do_not_split_sentences(texts, window):
    """Sentence ends found in small windows are also sentence ends of the full text."""
    text = "".join(texts)
    with pytest.MonkeyPatch.context() as patch:
        sentences_of_text = sentences.split_sentences(text, "en")
        patch.setattr(sentences, "_WINDOW_CHARS", window)
        sentences_of_windows = sentences.split_sentences(text, "en")
    assert "".join(sentences_of_windows) == text
    ends = set(itertools.accumulate(map(len, sentences_of_text)))
    assert ends >= set(itertools.accumulate(map(len, sentences_of_windows)))


@pytest.mark.parametrize(
    ("pause", "expected_ms"),
    [
        ("[pause:0s]", 0),
        ("[Pause : 0.25 S]", 250),
        ("【pause：300ms】", 300),
        ("[pause:\u30001.5s]", 1500),
        ("[pause:600s]", 600_000),
        ("[pause:600.001s]", None),
        ("[pause:1e9s]", None),
        ("[pause:-1s]", None),
        ("[pause:1,5s]", None),
        ("[pause:1]", None),
        ("[pause:1min]", None),
        ("[pause:]", None),
        ("[pause:[pause:1s]s]", None),
        ("【pause：x】", None),
        ("[ pause:1s", None),
    ],
)
def test_pause_becomes_silence_or_an_error(pause, expected_ms):
    text = f"One two three four {pause} five six seven eight"
    errors = list(chunking.find_pause_errors(text))
    if expected_ms is None:
        assert len(errors) == 1
    else:
        assert not errors
        chunks = chunk_text(text)
        assert [chunk.silence_after_ms for chunk in chunks] == [expected_ms, 0]
        assert "ause" not in "".join(chunk.prompt_text for chunk in chunks)
