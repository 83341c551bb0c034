"""A row as tables and JSON give it: its columns as plain values, and the faults that no column shows by itself.

Any mapping in; nothing here raises, and everything takes linear time. `plain_row` makes one value of all that
means the same (null, NaN, an empty cell; a map, a list of pairs), and drops control characters from what is
spoken, so that whatever looks for tags and pauses sees what the model would. `row_faults` judges what the schema
has let through.

Knows nothing of the schema itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from higgs_model.script import chunking
from higgs_model.script.chunking import SPEAKER_TAG
from higgs_model.script.normalize import normalize
from higgs_model.script.prompt import without_controls

SPEAKER = re.compile(r"SPEAKER[0-9]{1,4}")
"""What a speaker is called who is called after a tag."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,200}")
_SPEAKABLE = re.compile(r"[^\W_]|<SE")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_INTEGERS = (
    "chunk_max_words",
    "chunk_max_turns",
    "context_chunks",
    "seed",
    "top_k",
    "ras_win_len",
    "ras_win_max_num_repeat",
    "max_frames",
)

Faults = list[tuple[str, str]]
"""Columns, and what is wrong with them."""


def plain_row(data: Mapping[Any, Any], columns: Iterable[str]) -> tuple[dict[str, Any], Faults]:
    """The row's own columns as plain values, without those that are empty."""
    row: dict[str, Any] = {}
    for name in columns:
        value = _plain(data.get(name))
        if value is not None:
            row[name] = value
    row |= {name: _whole(row[name]) for name in _INTEGERS if name in row}
    if isinstance(row.get("text"), str):
        row["text"] = without_controls(row["text"])
    if isinstance(row.get("turns"), list | tuple):
        row["turns"] = tuple(map(_plain_turn, row["turns"]))
    found: Faults = []
    if isinstance(row.get("voices"), list):
        row["voices"], found = _voice_map(row["voices"])
    if isinstance(row.get("voices"), dict):
        row["voices"] = {name: voice for name, voice in row["voices"].items() if voice is not None} or None
    return {name: value for name, value in row.items() if not _is_blank(name, value)}, found


def row_faults(row: Mapping[str, Any], failed: set[Any]) -> Faults:
    """Faults within and between the columns of a plain row.

    Args:
        row: without the columns that the schema has refused.
        failed: the names of those.
    """
    found: Faults = []
    if "id" in row and (not _ID.fullmatch(row["id"]) or ".." in row["id"] or set(row["id"]) == {"."}):
        message = "it names a file: use 1 to 200 of A to Z, a to z, 0 to 9, '.', '_' and '-', and no '..'"
        found.append(("id", message))
    for column, value in row.items():
        if any(_SURROGATE.search(text) for text in _strings(value)):
            found.append((column, "it holds half of a surrogate pair, which is no character"))
    if "text" in row and "turns" in row:
        found.append(("turns", "give either text or turns, not both"))
    if not {"text", "turns"} & {*row, *failed}:
        found.append(("text", "there is nothing to say: give text, or turns"))
    given = [name for name in ("voice", "voices", "ref_audio") if name in row]
    if len(given) > 1:
        found.append((given[-1], f"give one of voice, voices and ref_audio, not {' and '.join(given)}"))
    if "ref_text" in row and "ref_audio" not in row and "ref_audio" not in failed:
        found.append(("ref_text", "it is the transcript of ref_audio, which is missing"))
    if "text" in row:
        found += [("text", message) for message in _text_faults(row["text"], tagged=True)]
    if "turns" in row:
        found += _turn_faults(row["turns"])
    return found + _speaker_faults(row)


def _plain(value: object) -> object:
    """NaN is null; arrays and array scalars are what they hold."""
    kind = type(value)
    if kind.__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and math.isnan(value):
        return None
    # pandas' own nulls answer no comparison.
    return None if kind.__name__ in ("NAType", "NaTType") else value


def _whole(value: object) -> object:
    """A table with gaps holds its integers as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_blank(name: str, value: object) -> bool:
    """An empty cell of a text column is a missing one; an empty id is a fault."""
    return value is None or (name != "id" and isinstance(value, str) and not value.strip())


def _plain_turn(turn: object) -> object:
    """What a turn has besides its speaker and text is none of ours."""
    if isinstance(turn, dict):
        turn = {name: turn[name] for name in ("speaker", "text") if name in turn}
        if isinstance(turn.get("text"), str):
            turn["text"] = without_controls(turn["text"])
    return turn


def _voice_map(pairs: list[object]) -> tuple[object, Faults]:
    """A list of `{speaker, voice}`, or of pairs, as a map; anything else stays for the schema to refuse."""
    found: dict[Any, Any] = {}
    faults: Faults = []
    for pair in pairs:
        if isinstance(pair, Mapping) and isinstance(pair.get("speaker"), str):
            speaker, voice = pair["speaker"], pair.get("voice")
        elif isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str):
            speaker, voice = pair
        else:
            return pairs, []
        if speaker in found and not faults:
            faults.append(("voices", f"{speaker[:200]!r} is in it twice; give each speaker one voice"))
        found[speaker] = voice
    return found, faults


def _strings(value: object) -> Iterable[str]:
    """All text in a column."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [*value, *value.values()]
    return [part for turn in value for part in turn.values()] if isinstance(value, tuple) else []


def _text_faults(text: str, tagged: bool) -> list[str]:
    found = list(dict.fromkeys(chunking.pause_faults(text)))
    plain = normalize(chunking.without_pauses(text))
    if not _SPEAKABLE.search(SPEAKER_TAG.sub(" ", plain)):
        found.append("there is nothing in it that can be spoken: no letter, no digit, no sound tag")
    elif tagged:
        mute = [turn for turn in chunking.spoken_turns(plain.removesuffix(".")) if chunking.is_only_tags(turn)]
        found += [f"the turn {turn!r} says nothing; give it words or take it out" for turn in mute[:3]]
    return found


def _turn_faults(turns: tuple[dict[str, str], ...]) -> Faults:
    found: Faults = []
    if not turns:
        found.append(("turns", "there are no turns in it"))
    for number, turn in enumerate(turns):
        for message in _text_faults(turn["text"], tagged=False):
            found.append(("turns", f"turn {number}: {message}"))
        if SPEAKER_TAG.search(normalize(turn["text"])):
            found.append(("turns", f"turn {number}: its text names a speaker; give each speaker a turn"))
    return found


def _speaker_faults(row: Mapping[str, Any]) -> Faults:
    speakers = [turn["speaker"] for turn in row.get("turns") or ()]
    voices = row.get("voices") or {}
    found: Faults = []
    tagged = [bool(SPEAKER.fullmatch(name)) for name in [*speakers, *voices]]
    if any(tagged) and not all(tagged):
        found.append(("voices", "call all speakers SPEAKER0, SPEAKER1, …, or none of them"))
    if "text" in row and voices and not any(tagged):
        found.append(("voices", "the speakers of a text are called SPEAKER0, SPEAKER1, … after its [SPEAKER0] tags"))
    found += [("voices", f"the voice of {name!r} is empty") for name, voice in voices.items() if not voice.strip()]
    return found
