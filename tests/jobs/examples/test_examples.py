"""The examples match their README."""

import re
from pathlib import Path

import pytest
import soundfile

from higgs_model.script.voices import Voices
from jobs.storage.manifest import open_manifest
from jobs.synthesize.row_processing import RowProcessor
from jobs.synthesize.settings import JobSettings

FOLDER = Path(__file__).parents[3] / "jobs" / "examples"
ROWS = {row["id"]: row for row in open_manifest(str(FOLDER / "scripts.jsonl")).rows()}
VOICES = Voices.from_folder(FOLDER / "voices")


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("out"))
    processor = RowProcessor(JobSettings(manifest="-", output=out, voices=str(FOLDER / "voices")))
    return {name: processor.validate(row).plan for name, row in ROWS.items()}


def test_every_script_is_valid_and_without_warnings(plans):
    assert {name: plan.warnings for name, plan in plans.items() if plan.warnings} == {}
    assert all(plan.chunks for plan in plans.values())


@pytest.mark.parametrize("name", VOICES.names())
def test_every_voice_meets_the_recommendations(name):
    voice = VOICES.recording(name)
    assert voice.warnings() == ()
    assert 5 <= voice.duration_s <= 8
    info = soundfile.info(FOLDER / "voices" / f"{name}.flac")
    assert (info.samplerate, info.channels) == (24_000, 1)
    assert (FOLDER / "voices" / f"{name}.flac").stat().st_size < 200_000


def test_readme_lists_every_script():
    listed = re.findall(r"^\| `([a-z-]+)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert listed == list(ROWS)


def test_scripts_show_what_the_readme_says(plans):
    first, second, *_ = plans["story-chapter"].chunks
    assert "\n" not in first.text
    assert (first.boundary, second.boundary) == ("paragraph", "paragraph")
    assert sum(len(chunk.text.split()) for chunk in plans["story-chapter"].chunks) > 300
    turns = plans["dialogue-three-speakers"]
    assert len({chunk.speakers for chunk in turns.chunks}) == 3
    assert list(turns.voices) == ["mira", "ada"]
    spoken = plans["numbers-and-abbreviations"].chunks[0].text
    assert spoken.startswith("Doctor Lindqvist paid one thousand")
    assert not re.search(r"\d", spoken)
    assert plans["german"].script.language == "de"
    assert "Lübeck" in VOICES.recording("jonas").transcript
    assert plans["pause-and-laugh"].chunks[0].silence_after_ms == 1500
    assert "<SE>[Laughter]</SE>" in plans["pause-and-laugh"].chunks[1].text
    assert plans["described-voice"].voices == {}
    assert ROWS["described-voice"]["collection"]
    # Each voice of the library is heard.
    used = {name for plan in plans.values() for name in plan.voices}
    profiles = {f"profile:{name}" for name in VOICES.profiles()}
    chosen = {row.get("voice") for row in ROWS.values()} | set(ROWS["dialogue-three-speakers"]["voices"].values())
    assert used == set(VOICES.names())
    assert profiles <= chosen
