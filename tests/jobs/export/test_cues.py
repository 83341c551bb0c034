"""Subtitle cues: complete, not overlapping, no line too wide; checked with other parsers."""

import re

import srt
import webvtt
from hypothesis import given
from hypothesis import strategies as st

from jobs.export.cues import LINE_COLUMNS, Cue, TimedChunk, columns, make_cues, pack
from jobs.export.subtitles import _srt, _vtt

WORDS = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=60)
TEXTS = st.lists(WORDS | st.sampled_from(["the.", "cat,", "<SE>[Laughter]</SE>", "你好世界", "-->", "&"]), max_size=60)


def chunks_of(texts, lengths):
    """Consecutive chunks, with pauses of a third of their durations."""
    clock, found = 0.0, []
    for text, length in zip(texts, lengths, strict=False):
        found.append(TimedChunk(text, clock, clock + length, "Ann"))
        clock += length * 4 / 3
    return found


def letters(text):
    return re.sub(r"\s", "", text)


CHUNKS = st.builds(
    chunks_of,
    st.lists(TEXTS.map(" ".join), max_size=6),
    st.lists(st.floats(0.0, 30.0), min_size=6, max_size=6),
)


@given(TEXTS.map(" ".join))
def test_cues_contain_all_words_in_lines_that_fit(text):
    pages = list(pack(text))
    assert letters("".join(line for page in pages for line in page)) == letters(text)
    for page in pages:
        assert 1 <= len(page) <= 2
        assert all(line and columns(line) <= LINE_COLUMNS for line in page)


@given(CHUNKS)
def test_times_increase_strictly_within_their_chunk(chunks):
    made = make_cues(chunks, lambda tag: tag)
    edges = [edge for cue in made for edge in (cue.start_ms, cue.end_ms)]
    assert all(cue.start_ms < cue.end_ms for cue in made)
    assert edges == sorted(edges)
    heard = [chunk for chunk in chunks if chunk.end_s - chunk.start_s > 0.5]
    if len(heard) == len(chunks):
        for cue in made:
            assert any(
                chunk.start_s - 0.002 <= cue.start_ms / 1000 and cue.end_ms / 1000 <= chunk.end_s + 0.002
                for chunk in chunks
            )


@given(CHUNKS)
def test_other_parsers_read_the_same(chunks):
    made = make_cues(chunks, lambda tag: tag)
    read = list(srt.parse(_srt(made)))
    assert [(one.start.total_seconds(), one.content) for one in read] == [
        (cue.start_ms / 1000, "\n".join(cue.lines).replace("-->", "→")) for cue in made
    ]
    captions = webvtt.from_string(_vtt(made)).captions
    assert len(captions) == len(made)
    for caption, cue in zip(captions, made, strict=True):
        assert caption.voice == "Ann"
        assert round(caption.start_in_seconds * 1000) // 1000 == cue.start_ms // 1000
        assert len(caption.raw_text.split("\n")) == len(cue.lines)


def test_chunk_time_is_divided_by_text_length():
    text = "This sentence has some words in it, and then a few more. " * 4
    made = make_cues([TimedChunk(text, 1.0, 13.0)], str)
    assert (made[0].start_ms, made[-1].end_ms) == (1000, 13_000)
    assert [cue.end_ms for cue in made[:-1]] == [cue.start_ms for cue in made[1:]]
    # One sentence a cue, for each fits on two lines and two do not.
    assert [" ".join(cue.lines) for cue in made] == [text.strip()[: len(text) // 4 - 1]] * 4
    assert {cue.end_ms - cue.start_ms for cue in made} == {3000}
    one, two = made[0].lines
    assert abs(len(one) - len(two)) < 8


def test_turns_and_sounds_inside_a_chunk():
    text = (
        "[SPEAKER0] Hello. <SE>[Laughter]</SE>\n[SPEAKER1] <SE_s>[Music]</SE_s> Good day & <bye>. <SE_e>[Music]</SE_e>"
    )
    names = {"SPEAKER0": "Ann", "SPEAKER1": "Bob <b>"}.get
    made = make_cues([TimedChunk(text, 0, 4, "Ann"), TimedChunk("Go on.", 5, 6, "Bob <b>")], names)
    assert [(cue.speaker, cue.lines, cue.opens) for cue in made] == [
        ("Ann", ("Hello. [Laughter]",), True),
        ("Bob <b>", ("[Music] Good day & <bye>.",), True),
        ("Bob <b>", ("Go on.",), False),
    ]
    assert "<v Bob &lt;b&gt;>[Music] Good day &amp; &lt;bye&gt;.\n" in _vtt(made)
    named = make_cues(
        [TimedChunk(text, 0, 4, "Ann"), TimedChunk("Go on.", 5, 6, "Bob <b>")], names, lambda name: f"{name}: "
    )
    assert [" ".join(cue.lines) for cue in named] == [
        "Ann: Hello. [Laughter]",
        "Bob <b>: [Music] Good day & <bye>.",
        "Go on.",
    ]


def test_chunks_without_duration_have_no_cues():
    assert make_cues([TimedChunk("Nothing came of this.", 3.0, 3.0), TimedChunk("This did.", 3.0, 4.0)], str) == [
        Cue(3000, 4000, ("This did.",), None, False)
    ]


def test_times_beyond_an_hour():
    assert "25:01:02,007 --> 25:01:03,000" in _srt(make_cues([TimedChunk("Late.", 90_062.007, 90_063.0)], str))
