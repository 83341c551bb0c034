"""Subtitle cues are complete, do not overlap, and have no line that is too wide; other parsers read them."""

import re

import srt
import webvtt
from hypothesis import given
from hypothesis import strategies as st

from jobs.export.cues import LINE_COLUMNS, Cue, TimedChunk, display_width, make_cues, paginate
from jobs.export.subtitles import _format_srt, _format_vtt

WORDS = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=60)
TEXTS = st.lists(WORDS | st.sampled_from(["the.", "cat,", "<SE>[Laughter]</SE>", "你好世界", "-->", "&"]), max_size=60)


def timed_chunks(texts, lengths):
    """Return consecutive chunks, each followed by a pause of a third of its duration."""
    start_s, chunks = 0.0, []
    for text, length in zip(texts, lengths, strict=False):
        chunks.append(TimedChunk(text, start_s, start_s + length, "Ann"))
        start_s += length * 4 / 3
    return chunks


def remove_spaces(text):
    return re.sub(r"\s", "", text)


CHUNKS = st.builds(
    timed_chunks,
    st.lists(TEXTS.map(" ".join), max_size=6),
    st.lists(st.floats(0.0, 30.0), min_size=6, max_size=6),
)


@given(TEXTS.map(" ".join))
def test_cues_contain_all_words_in_lines_that_fit(text):
    pages = list(paginate(text))
    assert remove_spaces("".join(line for page in pages for line in page)) == remove_spaces(text)
    for page in pages:
        assert 1 <= len(page) <= 2
        assert all(line and display_width(line) <= LINE_COLUMNS for line in page)


@given(CHUNKS)
def test_cue_times_increase_strictly_within_their_chunk(chunks):
    cues = make_cues(chunks, lambda tag: tag)
    edges = [edge for cue in cues for edge in (cue.start_ms, cue.end_ms)]
    assert all(cue.start_ms < cue.end_ms for cue in cues)
    assert edges == sorted(edges)
    # In very short chunks, rounding to milliseconds may push cues beyond the end.
    if all(chunk.end_s - chunk.start_s > 0.5 for chunk in chunks):
        for cue in cues:
            assert any(
                chunk.start_s - 0.002 <= cue.start_ms / 1000 and cue.end_ms / 1000 <= chunk.end_s + 0.002
                for chunk in chunks
            )


@given(CHUNKS)
def test_other_parsers_read_the_same_cues(chunks):
    cues = make_cues(chunks, lambda tag: tag)
    subtitles = list(srt.parse(_format_srt(cues)))
    assert [(subtitle.start.total_seconds(), subtitle.content) for subtitle in subtitles] == [
        (cue.start_ms / 1000, "\n".join(cue.lines).replace("-->", "→")) for cue in cues
    ]
    captions = webvtt.from_string(_format_vtt(cues)).captions
    assert len(captions) == len(cues)
    for caption, cue in zip(captions, cues, strict=True):
        assert caption.voice == "Ann"
        assert round(caption.start_in_seconds * 1000) // 1000 == cue.start_ms // 1000
        assert len(caption.raw_text.split("\n")) == len(cue.lines)


def test_chunk_time_is_divided_by_text_length():
    text = "This sentence has some words in it, and then a few more. " * 4
    cues = make_cues([TimedChunk(text, 1.0, 13.0)], str)
    assert (cues[0].start_ms, cues[-1].end_ms) == (1000, 13_000)
    assert [cue.end_ms for cue in cues[:-1]] == [cue.start_ms for cue in cues[1:]]
    # One sentence per cue, because one fits on two lines and two do not.
    assert [" ".join(cue.lines) for cue in cues] == [text.strip()[: len(text) // 4 - 1]] * 4
    assert {cue.end_ms - cue.start_ms for cue in cues} == {3000}
    first, second = cues[0].lines
    assert abs(len(first) - len(second)) < 8


def test_turns_and_sounds_in_a_chunk():
    text = (
        "[SPEAKER0] Hello. <SE>[Laughter]</SE>\n[SPEAKER1] <SE_s>[Music]</SE_s> Good day & <bye>. <SE_e>[Music]</SE_e>"
    )
    names = {"SPEAKER0": "Ann", "SPEAKER1": "Bob <b>"}.get
    cues = make_cues([TimedChunk(text, 0, 4, "Ann"), TimedChunk("Go on.", 5, 6, "Bob <b>")], names)
    assert [(cue.speaker, cue.lines, cue.starts_turn) for cue in cues] == [
        ("Ann", ("Hello. [Laughter]",), True),
        ("Bob <b>", ("[Music] Good day & <bye>.",), True),
        ("Bob <b>", ("Go on.",), False),
    ]
    assert "<v Bob &lt;b&gt;>[Music] Good day &amp; &lt;bye&gt;.\n" in _format_vtt(cues)
    cues_with_names = make_cues(
        [TimedChunk(text, 0, 4, "Ann"), TimedChunk("Go on.", 5, 6, "Bob <b>")], names, lambda name: f"{name}: "
    )
    assert [" ".join(cue.lines) for cue in cues_with_names] == [
        "Ann: Hello. [Laughter]",
        "Bob <b>: [Music] Good day & <bye>.",
        "Go on.",
    ]


def test_chunks_without_duration_have_no_cues():
    assert make_cues([TimedChunk("Nothing came of this.", 3.0, 3.0), TimedChunk("This did.", 3.0, 4.0)], str) == [
        Cue(3000, 4000, ("This did.",), None, False)
    ]


def test_times_longer_than_an_hour():
    assert "25:01:02,007 --> 25:01:03,000" in _format_srt(make_cues([TimedChunk("Late.", 90_062.007, 90_063.0)], str))
