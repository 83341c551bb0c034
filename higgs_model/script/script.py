"""The script: a validated manifest row or request body, and everything that follows from it alone.

In: a mapping. Out: a `Script`, or one `ValidationError` with every error of the row (`error_messages` lists them). Any
value of any type is a validation error at worst, never another exception, and validation takes linear time. Unknown
columns are ignored. Missing, null and NaN values are equivalent.

`content_hash` changes exactly when the audio could: two rows with the same prompts, pauses, voices and sampling
parameters have the same hash, however they were written. The id and unknown columns do not count, so a missing seed
must not be derived from the id.

Does not depend on files or tokens; a voice library is only queried.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

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
from higgs_model.script.normalize import SOUND_TAGS
from higgs_model.script.prompt import AudioPlaceholder, escape_user_text
from higgs_model.script.references import REFERENCE_NAME, References, VoiceChoice
from higgs_model.script.row import SPEAKER_TAG_NAME, find_row_errors, normalize_row
from higgs_model.script.spoken_forms import Lexicon, to_spoken_form

if TYPE_CHECKING:
    from higgs_model.script.voices import Voices

_TAG = re.compile(r"\[[a-z][a-z _-]{0,30}\]")
_MAX_SEED = 2**63 - 1


class Turn(BaseModel):
    """One speaker's turn in a row."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, hide_input_in_errors=True)

    speaker: str = Field(min_length=1, max_length=200)
    text: str = Field(min_length=1)


class Script(BaseModel):
    """One row of the manifest. For the fields see the columns in jobs/README.md."""

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
        """Report errors within and between fields together; pydantic alone would stop after the former."""
        if isinstance(data, Script):
            return handler(data)
        if not isinstance(data, Mapping):
            raise _validation_error([((), "expected a mapping of column names to values")])
        row, duplicates = normalize_row(data, cls.model_fields)
        details: list[tuple[tuple[int | str, ...], str]] = [((column,), message) for column, message in duplicates]
        script: Self | None = None
        try:
            script = handler(row)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            details += [(item["loc"], item["msg"]) for item in found]
        failed = {location[0] for location, _ in details if location}
        known = {name: value for name, value in row.items() if name not in failed}
        details += [((column,), message) for column, message in find_row_errors(known, failed)]
        if details or script is None:
            raise _validation_error(details)
        return script

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """Return a copy with defaults for fields that the row does not set."""
        values = self.model_dump(exclude_none=True)
        return type(self).model_validate({**defaults, **values})

    def tagged_text(self) -> str:
        """Return the script as one text, with tagged turns."""
        if self.turns is None:
            return (self.text or "").strip()
        return "\n".join(f"[{self._tags[turn.speaker]}] {turn.text.strip()}" for turn in self.turns)

    def speaker_tags(self) -> list[str]:
        """Return the speakers' tags in the reference's order, which is alphabetical: 10 comes before 2."""
        return sorted(set(SPEAKER_TAG.findall(self.tagged_text())))

    def speaker_name(self, tag: str) -> str:
        """Return the name that the row uses for the speaker with a tag."""
        return self._names.get(tag, tag)

    def chunks(self, lexicon: Lexicon | None = None) -> list[Chunk]:
        """Split the script into chunks."""
        text = self.tagged_text()
        if lexicon is not None:
            text = lexicon.apply(text)
        if self.spoken_forms:
            text = to_spoken_form(text, self.language)
        return chunking.chunk_text(
            text,
            self.chunk_method or "auto",
            max_words=self.chunk_max_words,
            max_turns=self.chunk_max_turns or 1,
            language=re.split("[-_]", self.language)[0].lower() if self.language else None,
        )

    def voice_choices(self) -> list[VoiceChoice]:
        """Return the voices, ordered by speaker number."""
        if self.ref_audio is not None:
            return [VoiceChoice("SPEAKER0", REFERENCE_NAME, ref_audio=self.ref_audio, ref_text=self.ref_text)]
        if self.voice is not None:
            return [VoiceChoice.parse("SPEAKER0", self.voice)]
        numbered = sorted((int(self._tags[name][7:]), voice) for name, voice in (self.voices or {}).items())
        return [VoiceChoice.parse(f"SPEAKER{number}", voice) for number, voice in numbered]

    def references(self, voices: Voices | None) -> References:
        """Return the messages that precede all chunks.

        Args:
            voices: the voice library; None: the voices' names are used in place of their content.

        Raises:
            BadInput: a voice does not exist or cannot be read.
        """
        return References.from_choices(
            self.voice_choices(),
            voices,
            scene=self.scene,
            speaker_tags=self.speaker_tags(),
            in_system=bool(self.voice_in_system),
        )

    def warnings(self) -> list[str]:
        """Return warnings about likely mistakes in the row."""
        warnings: list[str] = []
        text = self.tagged_text()
        speakers = self.speaker_tags()
        unknown_tags = {tag for tag in _TAG.findall(text) if tag not in SOUND_TAGS}
        if unknown_tags:
            known = " ".join(SOUND_TAGS)
            warnings.append(f"{', '.join(sorted(unknown_tags)[:5])} may be read aloud; the sound tags are {known}")
        if len(speakers) > 1 and len(self.voice_choices()) == 1 and self.voices is None:
            warnings.append(f"{len(speakers)} speakers share one voice; assign one to each in `voices`")
        if self.voices is not None:
            voiced = {self._tags[name] for name in self.voices}
            without_voice = [tag for tag in speakers if tag not in voiced]
            without_turns = sorted(voiced.difference(speakers, ["SPEAKER0"]))
            warnings += [f"{self.speaker_name(tag)} has no voice, so the model picks one" for tag in without_voice]
            warnings += [f"{self.speaker_name(tag)} has a voice but never speaks" for tag in without_turns]
        return warnings

    def content_hash(self, voices: Voices | None = None, lexicon: Lexicon | None = None) -> str:
        """Return a hash that changes exactly when the audio could.

        Args:
            voices: the voice library; None: the voices' names are used in place of their content.

        Raises:
            BadInput: a voice does not exist or cannot be read.
        """
        chunks = self.chunks(lexicon)
        references = self.references(voices)
        recording_hashes = {name: recording.audio_sha256 for name, recording in references.recordings.items()}
        context = self.context_chunks
        content = {
            "references": [
                [
                    [recording_hashes.get(part.name, part.name), 0] if isinstance(part, AudioPlaceholder) else part
                    for part in message.content
                ]
                for message in references.messages
            ],
            "chunks": [
                [escape_user_text(chunk.prompt_text), chunk.boundary, chunk.silence_before_ms, chunk.silence_after_ms]
                for chunk in chunks
            ],
            # Any value beyond the number of chunks means all of them.
            "context": None if context is None or context >= len(chunks) - 1 else context,
            # A transcript check may depend on the language.
            "language": self.language and self.language.lower(),
            "seed": self.seed,
            "sampling": self.sampling(),
            "max_frames": self.max_frames,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    def sampling(self) -> dict[str, Any]:
        """Return the arguments of `SamplingParams`, with the reference's defaults; temperature 0 is greedy."""
        window = 7 if self.ras_win_len is None else self.ras_win_len
        repeats = 2 if self.ras_win_max_num_repeat is None else self.ras_win_max_num_repeat
        temperature = 1.0 if self.temperature is None else float(self.temperature)
        sampled = {
            "do_sample": True,
            "temperature": temperature,
            "top_k": 50 if self.top_k is None else self.top_k,
            "top_p": 0.95 if self.top_p is None else float(self.top_p),
        }
        ras = {"ras_win_len": window, "ras_win_max_num_repeat": repeats} if window > 0 else {}
        return ({"do_sample": False} if temperature == 0 else sampled) | ras

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        return {tag: name for name, tag in self._tags.items()}

    @functools.cached_property
    def _tags(self) -> dict[str, str]:
        """Map speaker names to tags: the names themselves if all are tags, else numbered by first appearance."""
        names = dict.fromkeys([*(turn.speaker for turn in self.turns or ()), *(self.voices or ())])
        if all(SPEAKER_TAG_NAME.fullmatch(name) for name in names):
            return {name: name for name in names}
        return {name: f"SPEAKER{number}" for number, name in enumerate(names)}


def _validation_error(details: Iterable[tuple[tuple[int | str, ...], str]]) -> ValidationError:
    errors = [
        InitErrorDetails(type=PydanticCustomError("row", "{message}", {"message": message}), loc=location, input=None)
        for location, message in details
    ]
    return ValidationError.from_exception_data("Script", errors, hide_input=True)


def error_messages(error: ValidationError) -> list[str]:
    """Return all errors of a row, one line each, starting with the column."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    return [f"{'.'.join(map(str, item['loc'])) or 'row'}: {item['msg']}" for item in found]
