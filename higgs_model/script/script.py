"""The script: a manifest row or a request's body, checked, and everything that follows from it alone.

A mapping in; a `Script`, or one `ValidationError` that holds every fault of the row in words (`faults` lists
them). Any value of any type is a fault at worst, never another exception, and takes linear time. Columns that
are not the script's are ignored. Missing, null and NaN are the same.

`content_hash` changes exactly when the audio could: two rows with the same prompts, pauses, voices and
sampling have the same hash, however they were written. The id and whatever else the row holds do not count,
so a seed that a row does not give must not be drawn from the id.

Knows nothing of files, libraries or tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Protocol, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from higgs_model.script import chunking
from higgs_model.script.chunking import SPEAKER_TAG, Chunk, ChunkMethod
from higgs_model.script.normalize import SOUND_TAGS, normalize
from higgs_model.script.spoken import Lexicon, spoken_forms

ONE_OFF_VOICE = "ref_audio"
"""What a one-off recording is called among the audio of a prompt."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,200}")
_SPEAKER = re.compile(r"SPEAKER[0-9]{1,4}")
_TAG = re.compile(r"\[[a-z][a-z _-]{0,30}\]")
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
_MAX_SEED = 2**63 - 1


class Turn(BaseModel):
    """What one speaker says in a row."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, hide_input_in_errors=True)

    speaker: str = Field(min_length=1, max_length=200)
    text: str = Field(min_length=1)


@dataclasses.dataclass(frozen=True)
class VoiceChoice:
    """A speaker's voice as the row names it: a library's name, a profile, a description or a recording."""

    tag: str
    name: str
    profile: str | None = None
    description: str | None = None
    ref_audio: str | None = None
    ref_text: str | None = None


class Fingerprints(Protocol):
    """Who knows the content behind a voice's name."""

    def fingerprint(self, *, name: str | None = None, profile: str | None = None, ref_audio: str | None = None) -> str:
        """What changes when the voice would sound different."""


class Script(BaseModel):
    """One row of the manifest. The fields are documented in the README, with the manifest's columns."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, hide_input_in_errors=True)

    id: str
    text: str | None = None
    turns: tuple[Turn, ...] | None = None
    voice: str | None = None
    voices: dict[str, str] | None = None
    ref_audio: str | None = None
    ref_text: str | None = None
    scene: str | None = None
    language: str | None = Field(default=None, pattern=r"^[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8}){0,3}$")
    spoken_forms: bool | None = None
    chunk_method: ChunkMethod | None = None
    chunk_max_words: int | None = Field(default=None, ge=1, le=1_000_000)
    chunk_max_turns: int | None = Field(default=None, ge=1, le=1_000_000)
    context_chunks: int | None = Field(default=None, ge=0, le=1_000_000)
    voice_in_system: bool | None = None
    seed: int | None = Field(default=None, ge=0, le=_MAX_SEED)
    temperature: float | None = Field(default=None, ge=0, le=10, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    top_p: Annotated[float | None, Field(gt=0, le=1, allow_inf_nan=False)] = None
    ras_win_len: int | None = Field(default=None, ge=-1, le=100_000)
    ras_win_max_num_repeat: int | None = Field(default=None, ge=1, le=100_000)
    max_frames: int | None = Field(default=None, ge=1, le=100_000)

    @model_validator(mode="wrap")
    @classmethod
    def _check_all(cls, data: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Faults of fields and between fields together, where pydantic would stop after the first kind."""
        if isinstance(data, Script):
            return handler(data)
        row = _plain_row(data, cls.model_fields)
        details: list[InitErrorDetails] = []
        script: Self | None = None
        try:
            script = handler(row)
        except ValidationError as error:
            for fault in error.errors(include_url=False, include_context=False, include_input=False):
                custom = PydanticCustomError("field", fault["msg"])
                details.append(InitErrorDetails(type=custom, loc=fault["loc"], input=None))
        failed = {detail["loc"][0] for detail in details if detail.get("loc")}
        known = {name: value for name, value in row.items() if name not in failed}
        for column, message in _row_faults(known, failed):
            custom = PydanticCustomError("row", message)
            details.append(InitErrorDetails(type=custom, loc=(column,), input=None))
        if details or script is None:
            raise ValidationError.from_exception_data(cls.__name__, details, hide_input=True)
        return script

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """The same script, with a job's settings where the row gives none."""
        given = self.model_dump(exclude_none=True)
        return type(self).model_validate({**defaults, **given})

    def tagged_text(self) -> str:
        """The script as one text, its turns with tags."""
        if self.turns is None:
            return (self.text or "").strip()
        return "\n".join(f"[{self._tags[turn.speaker]}] {turn.text.strip()}" for turn in self.turns)

    def speaker_tags(self) -> list[str]:
        """The speakers in the order in which the reference lists them: by text, so 10 comes before 2."""
        return sorted(set(SPEAKER_TAG.findall(self.tagged_text())))

    def all_speakers(self) -> list[str]:
        """Tags of all who speak or have a voice."""
        return sorted({*self.speaker_tags(), *(self._tags[name] for name in self.voices or ())})

    def speaker_name(self, tag: str) -> str:
        """What the row calls the speaker of a tag."""
        return {own: name for name, own in self._tags.items()}.get(tag, tag)

    def chunks(self, lexicon: Lexicon | None = None) -> list[Chunk]:
        """The pieces of the script, in order."""
        text = self.tagged_text()
        if lexicon is not None:
            text = lexicon.apply(text)
        if self.spoken_forms:
            text = spoken_forms(text, self.language)
        return chunking.chunk_text(
            text,
            self.chunk_method or "auto",
            max_words=self.chunk_max_words,
            max_turns=self.chunk_max_turns or 1,
            language=self.language.lower()[:2] if self.language else None,
        )

    def voice_choices(self) -> list[VoiceChoice]:
        """The voices in the order of the speakers' numbers."""
        if self.ref_audio is not None:
            return [VoiceChoice("SPEAKER0", ONE_OFF_VOICE, ref_audio=self.ref_audio, ref_text=self.ref_text)]
        if self.voice is not None:
            return [_choice("SPEAKER0", self.voice)]
        numbered = sorted((int(self._tags[name][7:]), voice) for name, voice in (self.voices or {}).items())
        return [_choice(f"SPEAKER{number}", voice) for number, voice in numbered]

    def warnings(self) -> list[str]:
        """What the row may not mean as it says it."""
        found: list[str] = []
        text = self.tagged_text()
        spoken = self.speaker_tags()
        unknown = {tag for tag in _TAG.findall(text) if tag not in SOUND_TAGS}
        if unknown:
            known = " ".join(SOUND_TAGS)
            found.append(f"{', '.join(sorted(unknown)[:5])} may be read aloud; the known sound tags are {known}")
        if len(spoken) > 1 and len(self.voice_choices()) == 1 and self.voices is None:
            found.append(f"{len(spoken)} speakers share one voice; give each one in `voices`")
        if self.voices is not None:
            voiced = {self._tags[name] for name in self.voices}
            mute, silent = (
                [tag for tag in spoken if tag not in voiced],
                sorted(voiced.difference(spoken, ["SPEAKER0"])),
            )
            found += [f"{self.speaker_name(tag)} has no voice, so the model picks one" for tag in mute]
            found += [f"{self.speaker_name(tag)} has a voice but never speaks" for tag in silent]
        return found

    def content_hash(self, voices: Fingerprints | None = None, lexicon: Lexicon | None = None) -> str:
        """Changes exactly when the audio could.

        Args:
            voices: knows the recordings and profiles behind the names; without it, the names stand for
                themselves.
        """
        chunks = self.chunks(lexicon)
        choices = self.voice_choices()
        context = self.context_chunks
        content = {
            "chunks": [
                [chunk.prompt_text, chunk.boundary, chunk.silence_before_ms, chunk.silence_after_ms] for chunk in chunks
            ],
            "scene": (self.scene or "").strip() or None,
            "voices": [_voice_key(choice, voices) for choice in choices],
            "in_system": bool(self.voice_in_system) and any(choice.description is None for choice in choices),
            "speakers": self.speaker_tags() if not choices else len(self.all_speakers()) if self.voices else 1,
            # More context than there are chunks is all of it.
            "context": None if context is None or context >= len(chunks) - 1 else context,
            "seed": self.seed,
            "sampling": self.sampling(),
            "max_frames": self.max_frames,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    def sampling(self) -> dict[str, Any]:
        """The arguments of `SamplingParams`, with the reference's defaults; temperature 0 takes the likeliest code."""
        window = 7 if self.ras_win_len is None else self.ras_win_len
        repeats = 2 if self.ras_win_max_num_repeat is None else self.ras_win_max_num_repeat
        temperature = 1.0 if self.temperature is None else float(self.temperature)
        drawn = {
            "do_sample": True,
            "temperature": temperature,
            "top_k": 50 if self.top_k is None else self.top_k,
            "top_p": 0.95 if self.top_p is None else float(self.top_p),
        }
        rule = {"ras_win_len": window, "ras_win_max_num_repeat": repeats} if window > 0 else {}
        return ({"do_sample": False} if temperature == 0 else drawn) | rule

    @functools.cached_property
    def _tags(self) -> dict[str, str]:
        """Tags of the named speakers: their own where all have one, else by first appearance."""
        names = dict.fromkeys([*(turn.speaker for turn in self.turns or ()), *(self.voices or ())])
        if all(_SPEAKER.fullmatch(name) for name in names):
            return {name: name for name in names}
        return {name: f"SPEAKER{number}" for number, name in enumerate(names)}


def faults(error: ValidationError) -> list[str]:
    """Every fault of a row, each a line that starts with its column."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    return [f"{'.'.join(map(str, fault['loc'])) or 'row'}: {fault['msg']}" for fault in found]


def _choice(tag: str, voice: str) -> VoiceChoice:
    if voice.startswith("profile:"):
        return VoiceChoice(tag, voice, profile=voice.removeprefix("profile:").strip())
    if re.search(r"\s", voice.strip()):
        return VoiceChoice(tag, voice, description=voice.strip())
    return VoiceChoice(tag, voice.strip())


def _voice_key(choice: VoiceChoice, voices: Fingerprints | None) -> list[str | None]:
    text = (choice.ref_text or "").strip() or None
    if choice.description is not None:
        return [choice.tag, "description", choice.description]
    if choice.profile is not None:
        key = choice.profile if voices is None else voices.fingerprint(profile=choice.profile)
        return [choice.tag, "profile", key]
    if choice.ref_audio is not None:
        key = choice.ref_audio if voices is None else voices.fingerprint(ref_audio=choice.ref_audio)
        return [choice.tag, "recording", key, text]
    return [choice.tag, "voice", choice.name if voices is None else voices.fingerprint(name=choice.name)]


def _plain_row(data: object, fields: Mapping[str, object]) -> dict[str, Any]:
    """The row's own columns as plain values, from what tables make of nulls, lists and maps."""
    if not isinstance(data, Mapping):
        custom = PydanticCustomError("row", "a script is a mapping of column names to values")
        raise ValidationError.from_exception_data(
            "Script", [InitErrorDetails(type=custom, loc=(), input=None)], hide_input=True
        )
    row: dict[str, Any] = {}
    for name in fields:
        value = _plain(data.get(name))
        if value is not None:
            row[name] = value
    row |= {name: _whole(row[name]) for name in _INTEGERS if name in row}
    if isinstance(row.get("turns"), list):
        row["turns"] = tuple(row["turns"])
    if isinstance(row.get("voices"), list):
        row["voices"] = _voice_map(row["voices"])
    if isinstance(row.get("voices"), dict):
        row["voices"] = {name: voice for name, voice in row["voices"].items() if voice is not None} or None
    return {name: value for name, value in row.items() if not _is_blank(name, value)}


def _is_blank(name: str, value: object) -> bool:
    """An empty cell of a text column is a missing one; an empty id is a fault."""
    return value is None or (name != "id" and isinstance(value, str) and not value.strip())


def _plain(value: object) -> object:
    """NaN is null; arrays and array scalars are what they hold."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def _whole(value: object) -> object:
    """A table with gaps holds its integers as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _voice_map(pairs: list[object]) -> object:
    """A list of `{speaker, voice}`, or of pairs, as a map; anything else stays for the schema to refuse."""
    found: dict[Any, Any] = {}
    for pair in pairs:
        if isinstance(pair, Mapping) and isinstance(pair.get("speaker"), str):
            found[pair["speaker"]] = pair.get("voice")
        elif isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str):
            found[pair[0]] = pair[1]
        else:
            return pairs
    return found


def _row_faults(row: Mapping[str, Any], failed: set[Any]) -> list[tuple[str, str]]:
    """Faults that no field shows by itself; fields that failed are not in `row` and are not judged again."""
    found: list[tuple[str, str]] = []
    if "id" in row and (not _ID.fullmatch(row["id"]) or ".." in row["id"] or set(row["id"]) == {"."}):
        found.append(
            (
                "id",
                "it names a file: use 1 to 200 of A to Z, a to z, 0 to 9, '.', '_' and '-', and no '..'",
            )
        )
    found += [
        (column, "it holds half of a surrogate pair, which is no character") for column in row if _halved(row[column])
    ]
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


def _halved(value: object) -> bool:
    if isinstance(value, str):
        return _SURROGATE.search(value) is not None
    if isinstance(value, Mapping):
        return any(_halved(part) for pair in value.items() for part in pair)
    return isinstance(value, tuple) and any(_halved(part) for part in value)


def _text_faults(text: str, tagged: bool) -> list[str]:
    found = list(dict.fromkeys(chunking.pause_faults(text)))
    plain = normalize(chunking.without_pauses(text))
    if not _SPEAKABLE.search(SPEAKER_TAG.sub(" ", plain)):
        found.append("there is nothing in it that can be spoken: no letter, no digit, no sound tag")
    elif tagged:
        mute = [turn for turn in chunking.spoken_turns(plain.removesuffix(".")) if chunking.is_only_tags(turn)]
        found += [f"the turn {turn!r} says nothing; give it words or take it out" for turn in mute[:3]]
    return found


def _turn_faults(turns: tuple[Any, ...]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if not turns:
        found.append(("turns", "there are no turns in it"))
    for number, turn in enumerate(turns):
        text = turn.text if isinstance(turn, Turn) else turn.get("text")
        for message in _text_faults(text, tagged=False):
            found.append(("turns", f"turn {number}: {message}"))
        if SPEAKER_TAG.search(normalize(text)):
            found.append(("turns", f"turn {number}: its text names a speaker; give each speaker a turn"))
    return found


def _speaker_faults(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    turns, voices = row.get("turns") or (), row.get("voices") or {}
    speakers = [turn.speaker if isinstance(turn, Turn) else turn.get("speaker") for turn in turns]
    found: list[tuple[str, str]] = []
    tagged = [bool(_SPEAKER.fullmatch(name)) for name in [*speakers, *voices]]
    if any(tagged) and not all(tagged):
        found.append(("voices", "call all speakers SPEAKER0, SPEAKER1, …, or none of them"))
    if "text" in row and voices and not any(tagged):
        found.append(("voices", "the speakers of a text are called SPEAKER0, SPEAKER1, … after its [SPEAKER0] tags"))
    found += [("voices", f"the voice of {name!r} is empty") for name, voice in voices.items() if not voice.strip()]
    return found
