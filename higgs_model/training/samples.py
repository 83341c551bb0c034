"""Parsing of training manifest rows into samples.

A row has one of two forms:

* Simple: `text`, and `audio`, its recording. The other columns of the batch job (`voice`, `ref_audio` and `ref_text`,
  `scene`, `turns`, …) form the prompt exactly as in synthesis of the row as a single chunk. `speaker` identifies the
  speaker, so that other rows of that speaker can serve as references.
* ChatML: `messages`, a list of `{"role", "content"}`, where content is a text, or a list of texts,
  `{"type": "text", "text"}` and `{"type": "audio", "audio_url"}`. The assistant's messages from `start_index` on are
  training targets.

`audio` and `audio_url` are recordings by path or URI, or codes: a `.npy` file of (K, T) integers. They are not opened
here. Does not depend on the network.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from higgs_model.errors import BadInput
from higgs_model.script.prompt import (
    END_OF_MESSAGE,
    SCENE_END,
    SCENE_START,
    AudioPlaceholder,
    Encoder,
    Message,
    SpeakerVoice,
    Tokenizer,
    chunk_message,
    escape_user_text,
    reference_messages,
    take_message,
)
from higgs_model.script.script import Script, error_messages
from higgs_model.script.voices import Voice, Voices

Row = Mapping[str, Any]

_OWN_VOICE = ("voice", "voices", "ref_audio", "scene")
"""Columns with the row's own voice or scene; such rows are not combined with other rows of their speaker."""
_ROLES = ("system", "user", "assistant")
_PART_KEYS = {"text": ("type", "text"), "audio": ("type", "audio_url", "duration", "offset", "raw_audio")}


@dataclasses.dataclass(frozen=True)
class TokenSpan:
    """The tokens of one part of a sample, with their loss mask and the recordings they refer to.

    Attributes:
        ids: (S,) int32, with one placeholder per clip.
        loss_mask: (S,) bool, whether a token is a training target.
        clips: indices of the sample's recordings for the placeholders, in order.
    """

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    clips: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A row as tokens: `prefix` followed by `turn`.

    Attributes:
        id: the row's id.
        prefix: from the start of the text to the last reference; for ChatML the entire sample.
        turn: the text and its recording; empty for ChatML.
        reference: this row as a voice reference, used in place of the prefix of another row by the same speaker; None
            if it cannot serve as one.
        sources: the recordings, each a path, a URI or a voice of the library.
        speaker: the row's speaker; None: unknown.
    """

    id: str
    prefix: TokenSpan
    turn: TokenSpan
    reference: TokenSpan | None
    sources: tuple[str | Voice, ...]
    speaker: str | None = None


class SampleReader:
    """Parses rows for one tokenizer.

    Args:
        tokenizer: the tokenizer.
        voices: voice library for rows with a `voice`.
    """

    def __init__(self, tokenizer: Tokenizer, voices: Voices | None = None) -> None:
        self._encoder = Encoder(tokenizer)
        self._voices = voices or Voices()
        added = tokenizer.get_added_vocab()
        self._has_eom = END_OF_MESSAGE in added

    def read(self, row: Row, number: int) -> Sample:
        """Parse a row; `number` is its index in the manifest and its id if it has none.

        Raises:
            BadInput: the row is invalid; the message names the row.
        """
        name = row.get("id")
        row_id = f"row{number}" if _is_missing(name) else str(name)
        try:
            if not _is_missing(row.get("messages")):
                return self._parse_chat(row_id, row)
            return self._parse_simple(row_id, row)
        except BadInput as error:
            raise BadInput(f"row {number} ({row_id}): {error}") from error

    # ------------------------------------------------------------------ simple rows

    def _parse_simple(self, row_id: str, row: Row) -> Sample:
        audio, speaker = row.get("audio"), row.get("speaker")
        if not isinstance(audio, str) or not audio:
            raise BadInput(f"audio is {audio!r}; expected the recording's path, or messages instead of text and audio")
        try:
            script = Script.model_validate({**row, "id": row_id, "chunk_method": "none"})
        except ValidationError as error:
            raise BadInput("; ".join(error_messages(error))) from None
        chunks = script.chunks()
        if len(chunks) != 1:
            raise BadInput(f"the text has {len(chunks)} chunks; expected 1, so it must not contain [pause:…]")
        references = script.references(self._voices)
        names = [name for message in references.messages for name in message.clips]
        sources: tuple[str | Voice, ...] = (*(references.recordings[name] for name in names), audio)
        target = take_message(0)
        speaker_id = None if _is_missing(speaker) else str(speaker)
        turn = (chunk_message(chunks[0].prompt_text), target)
        reference = None
        has_own_voice = script.speaker_tags() or any(not _is_missing(row.get(column)) for column in _OWN_VOICE)
        if speaker_id is not None and not has_own_voice:
            voice = SpeakerVoice("SPEAKER0", target.clips[0], transcript=script.tagged_text())
            reference = self._encode(reference_messages(None, [voice], ["SPEAKER0"]), first_clip=len(names))
        return Sample(
            id=row_id,
            prefix=self._encode(references.messages),
            turn=self._encode(turn, starts_text=False, first_target=0, first_clip=len(names)),
            reference=reference,
            sources=sources,
            speaker=speaker_id,
        )

    # ------------------------------------------------------------------ ChatML

    def _parse_chat(self, row_id: str, row: Row) -> Sample:
        raw = row["messages"]
        if isinstance(raw, str):
            # Tables store nested columns of varying types as JSON.
            raw = _parse_json(raw)
        if not isinstance(raw, list | tuple | np.ndarray) or not len(raw):
            raise BadInput("messages must be a list of at least one message")
        first = row["start_index"] if not _is_missing(row.get("start_index")) else 0
        if not isinstance(first, int | float) or not 0 <= first < len(raw) or first != int(first):
            raise BadInput(f"start_index is {first!r}; expected the index of a message, 0 to {len(raw) - 1}")
        first = int(first)
        sources: list[str] = []
        messages = [_parse_message(f"messages[{index}]", message, sources) for index, message in enumerate(raw)]
        for index, (message, following) in enumerate(zip(messages, messages[1:], strict=False)):
            if message.role == following.role == "assistant":
                if not self._has_eom:
                    raise BadInput(
                        f"messages[{index}] and messages[{index + 1}] are both the assistant's, "
                        f"but the tokenizer has no {END_OF_MESSAGE}"
                    )
                messages[index] = dataclasses.replace(message, end=END_OF_MESSAGE)
        if not any(message.role == "assistant" for message in messages[first:]):
            raise BadInput(f"no message from start_index={first} on is the assistant's, so there is no training target")
        empty = TokenSpan(np.empty(0, np.int32), np.empty(0, np.bool_), ())
        prefix = self._encode(messages, first_target=first)
        return Sample(row_id, prefix, empty, None, tuple(sources))

    # ------------------------------------------------------------------ tokens

    def _encode(
        self,
        messages: Sequence[Message],
        *,
        starts_text: bool = True,
        first_target: int | None = None,
        first_clip: int = 0,
    ) -> TokenSpan:
        """Encode messages.

        Args:
            messages: the messages.
            starts_text: whether they are the start of the text.
            first_target: first message whose answer is a training target; None: none.
            first_clip: index of the recording of the first placeholder.
        """
        ids: list[int] = []
        loss_mask: list[bool] = []
        for index, message in enumerate(messages):
            header, *rest = self._encoder.encode_pieces(message, first=starts_text and index == 0)
            is_target = message.role == "assistant" and first_target is not None and index >= first_target
            answer = [token_id for piece in rest for token_id in piece]
            ids += header + answer
            loss_mask += [False] * len(header) + [is_target] * len(answer)
        num_clips = sum(len(message.clips) for message in messages)
        return TokenSpan(
            np.array(ids, np.int32), np.array(loss_mask, np.bool_), tuple(range(first_clip, first_clip + num_clips))
        )


def _parse_message(path: str, raw: Any, sources: list[str]) -> Message:
    if not isinstance(raw, Mapping):
        raise BadInput(f"{path} is {raw!r:.60}; expected an object with role and content")
    role = raw.get("role")
    if role not in _ROLES:
        raise BadInput(f"{path}.role is {role!r}; expected one of {', '.join(_ROLES)}")
    if not _is_missing(raw.get("recipient")):
        raise BadInput(f"{path}.recipient is {raw['recipient']!r}; messages to tools are not supported")
    content = raw.get("content")
    parts = content if isinstance(content, list | tuple | np.ndarray) else [content]
    parsed: list[str | AudioPlaceholder] = []
    for index, part in enumerate(parts):
        part_path = f"{path}.content" if parts is not content else f"{path}.content[{index}]"
        parsed.append(_parse_part(part_path, part, sources))
    return Message(role, tuple(part for part in parsed if part != ""))


def _parse_part(path: str, part: Any, sources: list[str]) -> str | AudioPlaceholder:
    if isinstance(part, str):
        return _neutralize_text(part)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _PART_KEYS:
        raise BadInput(f"{path} is {part!r:.60}; expected a text, or an object of type text or audio")
    unknown = [key for key, value in part.items() if key not in _PART_KEYS[kind] and not _is_missing(value)]
    unsupported = [key for key in ("duration", "offset", "raw_audio") if not _is_missing(part.get(key))]
    rejected = [*unknown, *unsupported]
    if kind == "audio" and not rejected and isinstance(part.get("audio_url"), str) and part["audio_url"]:
        sources.append(part["audio_url"])
        return AudioPlaceholder(part["audio_url"])
    if kind == "text" and not unknown and isinstance(part.get("text"), str):
        return _neutralize_text(part["text"])
    if rejected:
        raise BadInput(f"{path} has {', '.join(rejected)}; expected a full recording by audio_url, or a text by text")
    raise BadInput(f"{path} has no {'audio_url' if kind == 'audio' else 'text'}")


def _neutralize_text(text: str) -> str:
    """Return the text with all special tokens neutralized except those of a scene description."""
    parts = [text]
    for token in (SCENE_START, SCENE_END):
        parts = [piece for part in parts for piece in _split_keeping(part, token)]
    return "".join(part if part in (SCENE_START, SCENE_END) else escape_user_text(part) for part in parts)


def _split_keeping(text: str, token: str) -> list[str]:
    if text in (SCENE_START, SCENE_END):
        return [text]
    first, *others = text.split(token)
    return [first, *(piece for other in others for piece in (token, other))]


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadInput(f"messages is a string, but not valid JSON: {error}") from error


def _is_missing(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))
