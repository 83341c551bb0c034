"""Normalizes the values of a row from tables or JSON, and finds errors within and between its columns.

In: any mapping. Nothing here raises, and everything takes linear time. `normalize_row` unifies equivalent values (null,
NaN, empty cells; maps, lists of pairs) and removes control characters from text, so that later code sees the text that
the model reads. `find_row_errors` checks the columns that the schema has accepted.

Does not depend on the schema itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from higgs_model.script import chunking
from higgs_model.script.chunking import SPEAKER_TAG
from higgs_model.script.normalize import normalize
from higgs_model.script.prompt import remove_control_characters

SPEAKER_TAG_NAME = re.compile(r"SPEAKER[0-9]{1,4}")
"""A speaker name that is also the name in a speaker tag."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,200}")
_PRONOUNCEABLE = re.compile(r"[^\W_]|<SE")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_INTEGER_COLUMNS = (
    "chunk_max_words",
    "chunk_max_turns",
    "context_chunks",
    "seed",
    "top_k",
    "ras_win_len",
    "ras_win_max_num_repeat",
    "max_frames",
)

RowErrors = list[tuple[str, str]]
"""Pairs of a column and an error message."""


def normalize_row(data: Mapping[Any, Any], columns: Iterable[str]) -> tuple[dict[str, Any], RowErrors]:
    """Return the given columns as plain Python values, without empty ones, and errors in their structure."""
    row: dict[str, Any] = {}
    for name in columns:
        value = _convert_to_python(data.get(name))
        if value is not None:
            row[name] = value
    row |= {name: _convert_integral_float(row[name]) for name in _INTEGER_COLUMNS if name in row}
    if isinstance(row.get("text"), str):
        row["text"] = remove_control_characters(row["text"])
    if isinstance(row.get("turns"), list | tuple):
        row["turns"] = tuple(map(_normalize_turn, row["turns"]))
    errors: RowErrors = []
    if isinstance(row.get("voices"), list):
        row["voices"], errors = _parse_voice_map(row["voices"])
    if isinstance(row.get("voices"), dict):
        row["voices"] = {name: voice for name, voice in row["voices"].items() if voice is not None} or None
    return {name: value for name, value in row.items() if not _is_blank(name, value)}, errors


def find_row_errors(row: Mapping[str, Any], refused: set[Any]) -> RowErrors:
    """Return the errors within and between the columns of a normalized row.

    Args:
        row: its columns without those that the schema has refused.
        refused: the names of those columns.
    """
    errors: RowErrors = []
    if "id" in row and (not _ID.fullmatch(row["id"]) or ".." in row["id"] or set(row["id"]) == {"."}):
        message = "it becomes a file name: use 1 to 200 of A-Z, a-z, 0-9, '.', '_' and '-', without '..'"
        errors.append(("id", message))
    for column, value in row.items():
        if any(_SURROGATE.search(text) for text in _list_strings(value)):
            errors.append((column, "it contains an unpaired surrogate, which is not a character"))
    if "text" in row and "turns" in row:
        errors.append(("turns", "set either text or turns, not both"))
    if not {"text", "turns"} & {*row, *refused}:
        errors.append(("text", "missing: set text or turns"))
    voice_columns = [name for name in ("voice", "voices", "ref_audio") if name in row]
    if len(voice_columns) > 1:
        message = f"set only one of voice, voices and ref_audio, not {' and '.join(voice_columns)}"
        errors.append((voice_columns[-1], message))
    if "ref_text" in row and "ref_audio" not in row and "ref_audio" not in refused:
        errors.append(("ref_text", "it is the transcript of ref_audio, which is missing"))
    if "text" in row:
        errors += [("text", message) for message in _find_text_errors(row["text"], tagged=True)]
    if "turns" in row:
        errors += _find_turn_errors(row["turns"])
    return errors + _find_speaker_errors(row)


def _convert_to_python(value: object) -> object:
    """Convert NaN to null, and NumPy arrays and scalars to Python values."""
    kind = type(value)
    if kind.__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and math.isnan(value):
        return None
    # pandas' own nulls cannot be compared.
    return None if kind.__name__ in ("NAType", "NaTType") else value


def _convert_integral_float(value: object) -> object:
    """Convert integral floats, because tables store integers with gaps as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_blank(name: str, value: object) -> bool:
    """Return whether a value counts as missing. An empty id is an error instead."""
    return value is None or (name != "id" and isinstance(value, str) and not value.strip())


def _normalize_turn(turn: object) -> object:
    """Return a turn with only its speaker and text."""
    if isinstance(turn, dict):
        turn = {name: turn[name] for name in ("speaker", "text") if name in turn}
        if isinstance(turn.get("text"), str):
            turn["text"] = remove_control_characters(turn["text"])
    return turn


def _parse_voice_map(pairs: list[object]) -> tuple[object, RowErrors]:
    """Convert a list of `{speaker, voice}` or of pairs to a map; leave anything else for the schema to refuse."""
    voices: dict[Any, Any] = {}
    errors: RowErrors = []
    for pair in pairs:
        if isinstance(pair, Mapping) and isinstance(pair.get("speaker"), str):
            speaker, voice = pair["speaker"], pair.get("voice")
        elif isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str):
            speaker, voice = pair
        else:
            return pairs, []
        if speaker in voices and not errors:
            errors.append(("voices", f"{speaker[:200]!r} appears twice; assign one voice per speaker"))
        voices[speaker] = voice
    return voices, errors


def _list_strings(value: object) -> Iterable[str]:
    """Return all strings in a column."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [*value, *value.values()]
    return [part for turn in value for part in turn.values()] if isinstance(value, tuple) else []


def _find_text_errors(text: str, tagged: bool) -> list[str]:
    errors = list(dict.fromkeys(chunking.find_pause_errors(text)))
    normalized = normalize(chunking.remove_pauses(text))
    if not _PRONOUNCEABLE.search(SPEAKER_TAG.sub(" ", normalized)):
        errors.append("it contains nothing to speak: no letter, digit or sound tag")
    elif tagged:
        empty = [turn for turn in chunking.split_turns(normalized.removesuffix(".")) if chunking.is_only_tags(turn)]
        errors += [f"the turn {turn!r} is empty; add text or remove it" for turn in empty[:3]]
    return errors


def _find_turn_errors(turns: tuple[dict[str, str], ...]) -> RowErrors:
    errors: RowErrors = []
    if not turns:
        errors.append(("turns", "the list is empty"))
    for number, turn in enumerate(turns):
        for message in _find_text_errors(turn["text"], tagged=False):
            errors.append(("turns", f"turn {number}: {message}"))
        if SPEAKER_TAG.search(normalize(turn["text"])):
            errors.append(("turns", f"turn {number}: its text contains a speaker tag; use one turn per speaker"))
    return errors


def _find_speaker_errors(row: Mapping[str, Any]) -> RowErrors:
    speakers = [turn["speaker"] for turn in row.get("turns") or ()]
    voices = row.get("voices") or {}
    errors: RowErrors = []
    tagged = [bool(SPEAKER_TAG_NAME.fullmatch(name)) for name in [*speakers, *voices]]
    if any(tagged) and not all(tagged):
        errors.append(("voices", "name either all speakers SPEAKER0, SPEAKER1, …, or none"))
    if "text" in row and voices and not any(tagged):
        errors.append(("voices", "with text, speakers are named SPEAKER0, SPEAKER1, … like its [SPEAKER0] tags"))
    errors += [("voices", f"the voice of {name!r} is empty") for name, voice in voices.items() if not voice.strip()]
    return errors
