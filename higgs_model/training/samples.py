"""Rows of a training manifest: the one place that reads them. A row in, a `Sample` out.

A row has one of two forms:

* Simple: `text`, and `audio` that says it; whatever else a row of the batch job may have (`voice`, `ref_audio` and
  `ref_text`, `scene`, `turns`, …) stands in front of it exactly as when the model is asked to speak such a row, as one
  chunk. `speaker` names who speaks, so that other rows of the same speaker can serve as reference.
* ChatML: `messages`, a list of `{"role", "content"}`, where content is a text, or a list of texts, of
  `{"type": "text", "text"}` and of `{"type": "audio", "audio_url"}`. What the assistant says from message
  `start_index` on is learnt.

`audio` and `audio_url` are recordings by path or URI, or codes: a `.npy` file of (K, T) integers. Nothing here reads
them, or knows the network.
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
    MORE_FOLLOWS,
    SCENE_END,
    SCENE_START,
    Clip,
    Encoder,
    Message,
    SpeakerVoice,
    Tokenizer,
    chunk_message,
    reference_messages,
    take_message,
    user_text,
)
from higgs_model.script.script import Script, faults
from higgs_model.script.voices import Voice, Voices

Row = Mapping[str, Any]

_OWN_VOICE = ("voice", "voices", "ref_audio", "scene")
"""Columns that say who speaks or where; such a row gets no other recording of its speaker as reference."""
_ROLES = ("system", "user", "assistant")
_PART_KEYS = {"text": ("type", "text"), "audio": ("type", "audio_url", "duration", "offset", "raw_audio")}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A stretch of a sample.

    Attributes:
        ids: (S,) int32, one placeholder a clip.
        trained: (S,) bool, what the model has to say itself.
        clips: which of the sample's recordings fill the placeholders, in order.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    clips: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A row, as tokens; what is learnt is `head` and then `turn`.

    Attributes:
        head: from the beginning of the text to the references.
        turn: the text and the recording that says it; of ChatML nothing, all of it is head.
        reference: the row's recording in the place of the head of another row of its speaker; None: it cannot be there.
        sources: the recordings, each a path or URI, or a voice of the library.
        speaker: who speaks; None: nobody knows.
    """

    id: str
    head: Tokens
    turn: Tokens
    reference: Tokens | None
    sources: tuple[str | Voice, ...]
    speaker: str | None = None


class SampleReader:
    """Reads rows, for one tokenizer.

    Args:
        voices: where rows find voices.
    """

    def __init__(self, tokenizer: Tokenizer, voices: Voices | None = None) -> None:
        self._encoder = Encoder(tokenizer)
        self._voices = voices or Voices()
        added = tokenizer.get_added_vocab()
        self._has_more = MORE_FOLLOWS in added

    def read(self, row: Row, number: int) -> Sample:
        """One row; `number` is its place in the manifest, from 0, and its name if it has no `id`.

        Raises:
            BadInput: it is no sample, in one sentence that names the row.
        """
        name = row.get("id")
        identity = f"row{number}" if _absent(name) else str(name)
        try:
            if not _absent(row.get("messages")):
                return self._chat(identity, row)
            return self._simple(identity, row)
        except BadInput as error:
            raise BadInput(f"row {number} ({identity}): {error}") from error

    # ------------------------------------------------------------------ simple rows

    def _simple(self, identity: str, row: Row) -> Sample:
        audio, speaker = row.get("audio"), row.get("speaker")
        if not isinstance(audio, str) or not audio:
            raise BadInput(f"audio is {audio!r}; wanted the recording's path, or messages instead of text and audio")
        try:
            script = Script.model_validate({**row, "id": identity, "chunk_method": "none"})
        except ValidationError as error:
            raise BadInput("; ".join(faults(error))) from None
        chunks = script.chunks()
        if len(chunks) != 1:
            raise BadInput(f"the text is {len(chunks)} chunks; wanted one, so [pause:…] must not be inside of it")
        references = script.references(self._voices)
        names = [name for message in references.messages for name in message.clips]
        sources: tuple[str | Voice, ...] = (*(references.recordings[name] for name in names), audio)
        own = take_message(0)
        known = None if _absent(speaker) else str(speaker)
        spoken = (chunk_message(chunks[0].prompt_text), own)
        shown = None
        if known is not None and not script.speaker_tags() and all(_absent(row.get(column)) for column in _OWN_VOICE):
            voice = SpeakerVoice("SPEAKER0", own.clips[0], transcript=script.tagged_text())
            shown = self._tokens(reference_messages(None, [voice], ["SPEAKER0"]), first_clip=len(names))
        return Sample(
            id=identity,
            head=self._tokens(references.messages),
            turn=self._tokens(spoken, begins=False, trained_from=0, first_clip=len(names)),
            reference=shown,
            sources=sources,
            speaker=known,
        )

    # ------------------------------------------------------------------ ChatML

    def _chat(self, identity: str, row: Row) -> Sample:
        given = row["messages"]
        if isinstance(given, str):
            # Tables hold what is nested and uneven as JSON.
            given = _json(given)
        if not isinstance(given, list | tuple | np.ndarray) or not len(given):
            raise BadInput("messages must be a list of at least one message")
        first = row["start_index"] if not _absent(row.get("start_index")) else 0
        if not isinstance(first, int | float) or not 0 <= first < len(given) or first != int(first):
            raise BadInput(f"start_index is {first!r}; wanted the number of a message, 0 to {len(given) - 1}")
        first = int(first)
        sources: list[str] = []
        messages = [_message(f"messages[{at}]", one, sources) for at, one in enumerate(given)]
        for at, (one, following) in enumerate(zip(messages, messages[1:], strict=False)):
            if one.role == following.role == "assistant":
                if not self._has_more:
                    raise BadInput(
                        f"messages[{at}] and the next are both the assistant's, but the tokenizer has no {MORE_FOLLOWS}"
                    )
                messages[at] = dataclasses.replace(one, end=MORE_FOLLOWS)
        if not any(message.role == "assistant" for message in messages[first:]):
            raise BadInput(f"no message from start_index={first} on is the assistant's: there is nothing to learn")
        nothing = Tokens(np.empty(0, np.int32), np.empty(0, np.bool_), ())
        head = self._tokens(messages, trained_from=first)
        return Sample(identity, head, nothing, None, tuple(sources))

    # ------------------------------------------------------------------ tokens

    def _tokens(
        self,
        messages: Sequence[Message],
        *,
        begins: bool = True,
        trained_from: int | None = None,
        first_clip: int = 0,
    ) -> Tokens:
        """Messages as tokens.

        Args:
            begins: whether the text begins with them.
            trained_from: the message from which on answers are learnt; None: none is.
            first_clip: which recording fills the first placeholder.
        """
        ids: list[int] = []
        trained: list[bool] = []
        for at, message in enumerate(messages):
            header, *rest = self._encoder.pieces(message, first=begins and at == 0)
            learnt = message.role == "assistant" and trained_from is not None and at >= trained_from
            answer = [token_id for piece in rest for token_id in piece]
            ids += header + answer
            trained += [False] * len(header) + [learnt] * len(answer)
        num_clips = sum(len(message.clips) for message in messages)
        return Tokens(
            np.array(ids, np.int32), np.array(trained, np.bool_), tuple(range(first_clip, first_clip + num_clips))
        )


def _message(where: str, given: Any, sources: list[str]) -> Message:
    if not isinstance(given, Mapping):
        raise BadInput(f"{where} is {given!r:.60}; wanted an object with role and content")
    role = given.get("role")
    if role not in _ROLES:
        raise BadInput(f"{where}.role is {role!r}; wanted one of {', '.join(_ROLES)}")
    if not _absent(given.get("recipient")):
        raise BadInput(f"{where}.recipient is {given['recipient']!r}; messages to tools are not supported")
    content = given.get("content")
    parts = content if isinstance(content, list | tuple | np.ndarray) else [content]
    made: list[str | Clip] = []
    for at, part in enumerate(parts):
        place = f"{where}.content" if parts is not content else f"{where}.content[{at}]"
        made.append(_part(place, part, sources))
    return Message(role, tuple(part for part in made if part != ""))


def _part(where: str, part: Any, sources: list[str]) -> str | Clip:
    if isinstance(part, str):
        return _chat_text(part)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _PART_KEYS:
        raise BadInput(f"{where} is {part!r:.60}; wanted a text, or an object of type text or audio")
    strange = [key for key, value in part.items() if key not in _PART_KEYS[kind] and not _absent(value)]
    cut = [key for key in ("duration", "offset", "raw_audio") if not _absent(part.get(key))]
    if kind == "audio" and not strange and not cut and isinstance(part.get("audio_url"), str) and part["audio_url"]:
        sources.append(part["audio_url"])
        return Clip(part["audio_url"])
    if kind == "text" and not strange and isinstance(part.get("text"), str):
        return _chat_text(part["text"])
    if cut or strange:
        raise BadInput(f"{where} has {', '.join([*strange, *cut])}; give whole recordings by audio_url, texts by text")
    raise BadInput(f"{where} has no {'audio_url' if kind == 'audio' else 'text'}")


def _chat_text(text: str) -> str:
    """A text in which only the marks of a scene may be special tokens."""
    parts = [text]
    for mark in (SCENE_START, SCENE_END):
        parts = [piece for part in parts for piece in _around(part, mark)]
    return "".join(part if part in (SCENE_START, SCENE_END) else user_text(part) for part in parts)


def _around(text: str, mark: str) -> list[str]:
    if text in (SCENE_START, SCENE_END):
        return [text]
    first, *others = text.split(mark)
    return [first, *(piece for other in others for piece in (mark, other))]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadInput(f"messages are a text, but not of JSON: {error}") from error


def _absent(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))
