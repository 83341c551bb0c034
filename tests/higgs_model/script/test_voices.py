"""Voices: checks of recordings, cached codes, and errors for missing voices."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_model import Script
from higgs_model.errors import BadInput
from higgs_model.script.plan import Plan
from higgs_model.script.prompt_builder import PromptBuilder
from higgs_model.script.voices import ReferenceCodes, Voice, Voices
from tests.higgs_model.script.conftest import TinyCodec, tone, wav


@pytest.mark.parametrize(
    ("samples", "sample_rate", "transcript", "message"),
    [
        (tone(1), 24_000, "one", "1.0 s long"),
        (tone(40), 24_000, "one two three four " * 20, "40.0 s long"),
        (tone(5, sample_rate=8000), 8000, "one two three four five six", "8000 Hz"),
        (np.clip(tone(5, level=3), -1, 1), 24_000, "one two three four five six", "clipped"),
        (np.zeros(24_000 * 5, np.float32), 24_000, "one two three four five six", "silent"),
        (
            np.concatenate([np.zeros(48_000, np.float32), tone(4)]),
            24_000,
            "one two three four five six",
            "2.0 s and ends with 0.0 s",
        ),
        (tone(5), 24_000, None, "no transcript"),
        (tone(5), 24_000, "word " * 100, "20.0 words per second"),
        (np.stack([tone(5)] * 2, axis=1), 24_000, "one two three four five six", "2 channels"),
    ],
)
def test_each_problem_has_a_warning(samples, sample_rate, transcript, message):
    warnings = Voice(wav(samples, sample_rate), transcript).warnings()
    assert len(warnings) == 1
    assert message in warnings[0]


def test_good_recording_has_no_warnings():
    assert Voice(wav(tone(8)), "one two three four five six seven eight").warnings() == ()


@pytest.mark.parametrize("audio", [b"", b"RIFF", b"no audio at all" * 100, wav(tone(0.01))])
def test_invalid_recordings_are_refused(audio):
    with pytest.raises(BadInput):
        Voice(audio).warnings()


def test_codes_are_computed_once_per_content(tmp_path):
    codec = TinyCodec()
    first = ReferenceCodes(codec, "tiny", tmp_path / "codes")
    codes = first.get(Voice(wav(tone(4)), "one"))
    assert np.array_equal(first.get(Voice(wav(tone(4)), "another transcript")), codes)
    assert codec.calls == 1
    from_disk = ReferenceCodes(codec, "tiny", tmp_path / "codes").get(Voice(wav(tone(4))))
    assert np.array_equal(from_disk, codes)
    assert from_disk.dtype == np.int64
    assert codec.calls == 1
    ReferenceCodes(codec, "other weights", tmp_path / "codes").get(Voice(wav(tone(4))))
    assert codec.calls == 2


@given(offset=st.integers(0, 2000), junk=st.binary(min_size=1, max_size=40), truncate=st.booleans())
@settings(max_examples=60, deadline=None)
def test_corrupt_cache_entries_are_recomputed(tmp_path_factory, offset, junk, truncate):
    folder = tmp_path_factory.mktemp("codes")
    voice = Voice(wav(tone(0.5)))
    codes = ReferenceCodes(TinyCodec(), "tiny", folder).get(voice)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    offset %= len(content)
    file.write_bytes(content[:offset] + junk + (b"" if truncate else content[offset + len(junk) :]))
    assert np.array_equal(ReferenceCodes(TinyCodec(), "tiny", folder).get(voice), codes)


def test_unwritable_cache_is_not_an_error(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    assert ReferenceCodes(TinyCodec(), "tiny", tmp_path / "file").get(Voice(wav(tone(4)))).shape == (8, 100)
    assert "cannot be cached" in caplog.text


def test_concurrent_workers_share_a_cache_folder(tmp_path):
    voices = [Voice(wav(tone(1, hz=200 + number))) for number in range(8)]
    expected = [ReferenceCodes(TinyCodec(), "tiny").get(voice) for voice in voices]

    def load_all(_):
        cache = ReferenceCodes(TinyCodec(), "tiny", tmp_path)
        return all(np.array_equal(cache.get(voice), codes) for voice, codes in zip(voices, expected, strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(load_all, range(16)))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npz"] * 8


def test_custom_voice_store_provides_recordings(tokenizer, codes):
    class RemoteStore:
        files = {"zoe.flac": wav(tone(4)), "zoe.txt": b"\xef\xbb\xbfOne two three four five."}

        def names(self):
            return list(self.files)

        def read(self, name):
            return self.files[name]

    voices = Voices(RemoteStore())
    assert voices.names() == ["zoe"]
    plan = Plan.from_script(Script(id="a", text="Hello there.", voice="zoe"), voices)
    prompt = PromptBuilder(plan, tokenizer, codes).build(0, [])
    assert "\n\nOne two three four five.<|eot_id|>" in prompt.text
    assert prompt.codes[0].shape == (8, 100)


def test_unknown_voice_suggests_the_nearest(voices):
    with pytest.raises(BadInput, match="did you mean ada"):
        Plan.from_script(Script(id="a", text="Hello.", voice="adda"), voices)
    with pytest.raises(BadInput, match="no profile 'loud'"):
        Plan.from_script(Script(id="a", text="Hello.", voice="profile:loud"), voices)


def test_paths_are_not_voice_names(voices):
    with pytest.raises(BadInput, match="no voice"):
        Plan.from_script(Script(id="a", text="Hello.", voice="../../etc/passwd"), voices)


def test_row_recording_without_transcript_goes_into_the_system_message(tmp_path, tokenizer, codes):
    path = tmp_path / "me.wav"
    path.write_bytes(wav(tone(4)))
    with_transcript = Plan.from_script(
        Script(id="a", text="Hello.", ref_audio=str(path), ref_text="One two three four."), Voices()
    )
    assert [message.role for message in with_transcript.references] == ["user", "assistant"]
    assert PromptBuilder(with_transcript, tokenizer, codes).build(0, []).audio == ("ref_audio",)
    without_transcript = Plan.from_script(Script(id="a", text="Hello.", ref_audio=str(path)), Voices())
    assert [message.role for message in without_transcript.references] == ["system"]
    assert "no transcript" in without_transcript.warnings[0]
    with pytest.raises(BadInput, match="cannot be read"):
        Plan.from_script(Script(id="a", text="Hello.", ref_audio=str(tmp_path / "nobody.wav")), Voices())


def test_unsupported_language_has_a_warning():
    russian = Script(id="a", text="Это довольно длинное предложение на русском языке.")
    assert "'ru'" in Plan.from_script(russian, Voices()).warnings[0]
    english = Script(id="a", text="This is quite a long sentence in the English language.")
    assert Plan.from_script(english, Voices()).warnings == ()
