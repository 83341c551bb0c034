"""ChatML prompts: the text, token ids and codes that precede the model's answer for a chunk.

In: messages. Out: `Prompt`s. Text and ids equal the reference implementation's, piece by piece: it encodes each header,
each part of the content and each end token separately. User text enters only through `escape_user_text`, so it can
never become a special token; `Encoder` verifies this for every piece.

Does not depend on rows, chunk methods or the origin of codes.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from higgs_model import tokens
from higgs_model.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Codes = NDArray[np.int64]
    """(K, T)."""

BEGIN = "<|begin_of_text|>"
END_OF_TURN = "<|eot_id|>"
END_OF_MESSAGE = "<|eom_id|>"
"""Ends an assistant message that is followed by another one; all others end with `END_OF_TURN`."""
SCENE_START = "<|scene_desc_start|>"
SCENE_END = "<|scene_desc_end|>"

INSTRUCTION = "Generate audio following instruction."
MULTI_SPEAKER_INSTRUCTION = (
    "You are an AI assistant designed to convert text into speech.\n"
    "If the user's message includes a [SPEAKER*] tag, do not read out the tag and generate speech for the "
    "following text, using the specified voice.\n"
    "If no speaker tag is present, select a suitable voice on your own."
)
DEFAULT_SPEAKER_DESCRIPTIONS = ("feminine", "masculine")
"""Descriptions of speakers without a voice, alternating."""

Role = Literal["system", "user", "assistant"]
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")


class Tokenizer(Protocol):
    """The subset of the transformers tokenizer interface that is used here."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text; special tokens in it are recognized."""

    def get_added_vocab(self) -> dict[str, int]:
        """Return all special tokens with their ids."""

    def convert_tokens_to_ids(self, tokens: str) -> int:
        """Return the id of one token."""


@dataclasses.dataclass(frozen=True)
class AudioPlaceholder:
    """A placeholder for audio in a message: a voice's name, or `chunk0`, `chunk1`, …"""

    name: str


@dataclasses.dataclass(frozen=True)
class Message:
    """A message of the conversation; each string in `content` is encoded separately."""

    role: Role
    content: tuple[str | AudioPlaceholder, ...]
    end: str = END_OF_TURN

    def pieces(self) -> Iterator[str]:
        """Yield the pieces that the reference encodes separately."""
        yield format_header(self.role)
        for part in self.content:
            yield part if isinstance(part, str) else _placeholder(self.role)
        yield self.end

    @functools.cached_property
    def text(self) -> str:
        """The message as ChatML."""
        return "".join(self.pieces())

    @functools.cached_property
    def clips(self) -> tuple[str, ...]:
        """The names of its audio, in order."""
        return tuple(part.name for part in self.content if isinstance(part, AudioPlaceholder))


@dataclasses.dataclass(frozen=True)
class SpeakerVoice:
    """A speaker's voice in a prompt: a recording with its transcript, or a description.

    Attributes:
        tag: `SPEAKER0`, …
        name: name of the recording in `Prompt.audio`.
        description: used instead of a recording.
        transcript: transcript of the recording.
    """

    tag: str
    name: str
    description: str | None = None
    transcript: str | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The prompt of one chunk.

    Attributes:
        text: the full ChatML text, up to and including the assistant's header.
        token_ids: its ids, with one placeholder per clip, and `<|audio_out_bos|>` at the end with `force_audio`.
        audio: names of the clips, in order.
        codes: codes (K, T) of the clips, without the delay pattern.
        num_positions: length in the model: ids, with each placeholder replaced by its clip in delayed form.
        max_frames: maximum frames of the answer.
        first_context_chunk: the oldest chunk in the prompt; the chunk's own index if there is none.
    """

    text: str
    token_ids: list[int]
    audio: tuple[str, ...]
    codes: tuple[Codes, ...]
    num_positions: int
    max_frames: int
    first_context_chunk: int


def escape_user_text(text: str) -> str:
    """Make text safe for a prompt: split `<|`, and remove control characters and surrogates."""
    return _SURROGATES.sub("", remove_control_characters(text)).replace("<|", "< |")


def remove_control_characters(text: str) -> str:
    """Remove control characters other than whitespace."""
    return _CONTROLS.sub("", text)


def reference_messages(
    scene: str | None,
    voices: Sequence[SpeakerVoice],
    speaker_tags: Sequence[str],
    *,
    in_system: bool = False,
) -> list[Message]:
    """Build the messages that precede the script's own.

    Args:
        scene: description of the scene.
        voices: ordered by speaker number.
        speaker_tags: the script's speakers; without voices they get default descriptions.
        in_system: put recordings into the system message; implied if any voice is a description.
    """
    scene = escape_user_text(scene or "").strip() or None
    if not voices:
        return [_build_system_without_voices(scene, speaker_tags)]
    if in_system or any(voice.description is not None for voice in voices):
        return [_build_system_with_voices(scene, voices)]
    # Transcripts are tagged unless the only voice is the first speaker's.
    tagged = [voice.tag for voice in voices] != ["SPEAKER0"]
    messages = [Message("system", (f"{INSTRUCTION}\n\n{_format_scene(scene)}",))] if scene else []
    for voice in voices:
        transcript = escape_user_text(voice.transcript or "").strip()
        content = f"[{voice.tag}] {transcript}" if tagged else transcript
        messages += [Message("user", (content,)), Message("assistant", (AudioPlaceholder(voice.name),))]
    return messages


def chunk_message(text: str) -> Message:
    """Return the user message of a chunk."""
    return Message("user", (escape_user_text(text),))


def take_message(index: int) -> Message:
    """Return the assistant message with the take of a chunk."""
    return Message("assistant", (AudioPlaceholder(f"chunk{index}"),))


def render(messages: Sequence[Message]) -> str:
    """Return the full ChatML text, ending with the assistant's header."""
    return BEGIN + "".join(message.text for message in messages) + format_header("assistant")


def format_header(role: Role) -> str:
    """Return the header of a message."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _placeholder(role: Role) -> str:
    if role == "assistant":
        return tokens.AUDIO_OUT_BOS + tokens.AUDIO_OUT + tokens.AUDIO_EOS
    return tokens.AUDIO_BOS + tokens.AUDIO_IN + tokens.AUDIO_EOS


def _format_scene(description: str) -> str:
    return f"{SCENE_START}\n{description}\n{SCENE_END}"


def _build_system_without_voices(scene: str | None, speaker_tags: Sequence[str]) -> Message:
    if len(speaker_tags) > 1:
        speakers = "\n".join(
            f"{tag}: {DEFAULT_SPEAKER_DESCRIPTIONS[index % len(DEFAULT_SPEAKER_DESCRIPTIONS)]}"
            for index, tag in enumerate(speaker_tags)
        )
        description = f"{scene}\n\n{speakers}" if scene else speakers
        return Message("system", (f"{MULTI_SPEAKER_INSTRUCTION}\n\n{_format_scene(description)}",))
    return Message("system", (f"{INSTRUCTION}\n\n{_format_scene(scene)}" if scene else INSTRUCTION,))


def _build_system_with_voices(scene: str | None, voices: Sequence[SpeakerVoice]) -> Message:
    """Build the system message; the text up to each recording is one piece, as in the reference."""
    content: list[str | AudioPlaceholder] = []
    text = f"{INSTRUCTION}\n\n{SCENE_START}\n" + (f"{scene}\n\n" if scene else "")
    for index, voice in enumerate(voices):
        text += ("\n" if index else "") + f"{voice.tag}: "
        if voice.description is None:
            content += [text, AudioPlaceholder(voice.name)]
            text = ""
        else:
            text += escape_user_text(voice.description)
    content.append(f"{text}\n{SCENE_END}")
    return Message("system", tuple(content))


class Encoder:
    """Encodes messages, and verifies that user text adds no special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_vocab()
        self._special_ids = frozenset(added.values())
        by_length = sorted((token for token in added if token), key=len, reverse=True)
        self._special_re = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        missing = [token for token in (BEGIN, END_OF_TURN, *_AUDIO_TOKENS) if token not in added]
        if missing:
            raise BadInput(f"the tokenizer has no special token {missing[0]!r}; it is not a Higgs Audio tokenizer")
        self.audio_out_bos_id: int = added[tokens.AUDIO_OUT_BOS]

    def encode_message(self, message: Message, *, first: bool = False) -> list[int]:
        """Return the ids of a message; `first` prepends the begin-of-text token."""
        return [token_id for piece in self.encode_pieces(message, first=first) for token_id in piece]

    def encode_pieces(self, message: Message, *, first: bool = False) -> list[list[int]]:
        """Return the ids of each piece of a message: header, each part of the content, end token."""
        return [
            self._encode_piece((BEGIN if first and number == 0 else "") + piece)
            for number, piece in enumerate(message.pieces())
        ]

    def encode_header(self) -> list[int]:
        """Return the ids of the assistant's header."""
        return self._encode_piece(format_header("assistant"))

    def _encode_piece(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        expected = [token for token in self._special_re.findall(text) if token in _PROMPT_TOKENS]
        got = sum(token_id in self._special_ids for token_id in ids)
        if got != len(expected):
            raise BadInput(
                f"the text contains {got - len(expected)} special token(s) of the tokenizer "
                f"near {text[:60]!r}; rephrase it"
            )
        return ids


_AUDIO_TOKENS = (
    tokens.AUDIO_BOS,
    tokens.AUDIO_EOS,
    tokens.AUDIO_OUT_BOS,
    tokens.AUDIO_IN,
    tokens.AUDIO_OUT,
)
_SOUND_TAG_TOKENS = tuple(f"<{slash}SE{kind}>" for slash in ("", "/") for kind in ("", "_s", "_e"))
"""Normalized sound tags, which a tokenizer may have as special tokens."""
_PROMPT_TOKENS = frozenset(
    (
        BEGIN,
        END_OF_TURN,
        END_OF_MESSAGE,
        SCENE_START,
        SCENE_END,
        "<|start_header_id|>",
        "<|end_header_id|>",
        *_AUDIO_TOKENS,
        *_SOUND_TAG_TOKENS,
    )
)
